"""One small forward and backward of every kernel, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from d2m_kernels import (
    Stream,
    backends,
    combine,
    grouped_gemm,
    modulate_route,
    moe_ffn,
    moe_ffn_pair,
    permute,
    route,
)

T, D, S, H, E = 70, 48, 16, 24, 5


def every_kernel(name: str, device: str = "cuda") -> None:
    """Calls of back-end `name` that launch each of its kernels at least once."""
    torch.manual_seed(0)

    def new(*size, grad=True, dtype=torch.bfloat16):
        return torch.randn(*size, device=device, dtype=dtype, requires_grad=grad)

    x, router = new(T, D), new(E, D, dtype=torch.float32)
    w1, w2, b1, b2 = new(S + E * H, D), new(D, S + E * H), new(S + E * H), new(D)
    mask = torch.arange(T, device=device) % 5 != 0
    y = moe_ffn(x, router, w1, w2, b1, b2, top_k=2, shared=S, token_mask=mask, backend=name)
    y.sum().backward()
    gated = new(2 * E * H, D), new(D, E * H), new(2 * E * H), new(D)  # and no shared expert
    moe_ffn(x, router, *gated, top_k=1, activation="swiglu", backend=name).sum().backward()
    moe_ffn(x, router, w1, w2, top_k="dense", shared=S, backend=name).sum().backward()

    r = route(x, router, top_k=2, backend=name)
    for experts in (E, 14, 256):  # few: selected where the logits are summed; many: by a kernel
        many = new(experts, D, grad=False, dtype=torch.float32)
        adaln = new(2, 3 * D, grad=False).chunk(3, -1)
        modulate_route(x.detach(), *adaln[:2], many, top_k=2, backend=name)
        ids = route(x, many, top_k=2, token_mask=mask, backend=name).ids
        permute(ids, experts, backend=name)
    stacked = w1[S:].view(E, H, D)
    bias = b1[S:].view(E, H)
    h = grouped_gemm(x, stacked, r.offsets, gather=r.order // 2, bias=bias, activation="silu",
                     backend=name)  # fmt: skip
    h.sum().backward()
    combine(h.detach(), r, shared=new(T, H), bias=new(H), backend=name).sum().backward()

    pair = [Stream(t, router, w1, w2, b1, b2, top_k=2, shared=S) for t in (x, x[:9])]
    sum(y.sum() for y in moe_ffn_pair(*pair, backend=name)).backward()
    with torch.no_grad():
        block = Stream(x, router, w1, w2, b1, b2, top_k=2, shared=S, modulation=adaln[:2],
                       gate=adaln[2], residual=x)  # fmt: skip
        moe_ffn_pair(block, pair[1], backend=name)


def main() -> None:
    for name in ("cuda", "triton"):
        reason = backends.why_not(name, "cuda", torch.bfloat16)
        print(name, reason or "runs", flush=True)
        if reason is None:
            every_kernel(name)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
