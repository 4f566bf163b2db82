"""The machine's own ceilings, measured at start: a large matrix product and a large copy."""

from __future__ import annotations

import torch
from harness.race import race

SIZES = {  # (M = N = K of the product, bytes of the copy)
    ("cpu", "tiny"): (256, 1 << 22),
    ("cpu", "quick"): (1536, 1 << 27),
    ("cpu", "default"): (3072, 1 << 29),
    ("cuda", "default"): (8192, 4 << 30),
}


def measure(device: torch.device, size: str) -> dict:
    """TFLOP/s of a bf16 product of random matrices, GB/s (read + written) of a copy."""
    fallback = SIZES[device.type, "default"]
    n, nbytes = SIZES.get((device.type, size), fallback)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    result = race(
        {"matmul": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}, 7, device
    )
    return {
        "tflops": 2e-12 * n**3 / result.median("matmul"),
        "gbps": 2e-9 * nbytes / result.median("copy"),
        "how": f"median of 7: {n}^3 bf16 product, random data; copy of {nbytes >> 20} MiB",
        "seconds": result.to_json(),
    }
