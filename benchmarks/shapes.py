"""The FFN shapes that are measured, and what each stage costs at least.

T tokens, D model, F hidden = S shared + E * H, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FFNShape:
    T: int
    D: int = 3072
    S: int = 3072
    H: int = 768
    E: int = 12
    K: int = 2
    dtype: torch.dtype = torch.bfloat16

    @property
    def F(self) -> int:
        return self.S + self.E * self.H

    @property
    def activated(self) -> int:
        return self.S + self.K * self.H

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"T={self.T} D={self.D} S={self.S} {self.E}x{self.H} top-{self.K} {name}"

    def gflop(self, neurons: int, products: int = 2) -> float:
        """`products` matrix products of all tokens with `neurons` neurons each."""
        return 2e-9 * products * self.T * self.D * neurons

    def gbyte(self, *elements: int) -> float:
        return 1e-9 * sum(elements) * self.dtype.itemsize

    def tensors(self, device, grad: bool = False) -> dict[str, torch.Tensor]:
        """Random x, router, w1, b1, w2, b2, scaled as a trained layer's are."""
        g = torch.Generator().manual_seed(0)

        def draw(*size, scale=1.0, dtype=self.dtype):
            t = torch.empty(*size, dtype=torch.float32).normal_(generator=g) * scale
            return t.to(device, dtype).requires_grad_(grad)

        return {
            "x": draw(self.T, self.D),
            "router": draw(self.E, self.D, scale=0.02, dtype=torch.float32),
            "w1": draw(self.F, self.D, scale=self.D**-0.5),
            "b1": draw(self.F, scale=0.02),
            "w2": draw(self.D, self.F, scale=self.F**-0.5),
            "b2": draw(self.D, scale=0.02),
        }


def flux(quick: bool) -> FFNShape:
    """The FFN of FLUX.1 at 1024x1024; quick: an eighth of the tokens, a third of the width."""
    return FFNShape(T=576, D=1024, S=1536, H=384) if quick else FFNShape(T=4608)


def dit_xl(quick: bool) -> FFNShape:
    """The FFN of DiT-XL/2 at 256x256, batch 8."""
    return FFNShape(T=256 if quick else 2048, D=1152, S=1152, H=288)
