"""The FFN shapes that are measured, and their data with the routing forced.

T tokens, D model, F hidden = S shared + E * H, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

ROUTINGS = ("balanced", "zipf")
ZIPF_EXPONENT = 1.0
# How far the logits of the chosen experts stand out, in standard deviations of the others.
_MARGIN = 12.0


@dataclass(frozen=True)
class FFNShape:
    T: int
    D: int = 3072
    S: int = 3072
    H: int = 768
    E: int = 12
    K: int = 2
    dtype: torch.dtype = torch.bfloat16
    routing: str = "balanced"  # or "zipf", or "zipf:EXPONENT"

    @property
    def F(self) -> int:
        return self.S + self.E * self.H

    @property
    def activated(self) -> int:
        return self.S + self.K * self.H

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"T={self.T} D={self.D} S={self.S} {self.E}x{self.H} top-{self.K} {name} {self.routing}"
        )

    def to_json(self) -> dict:
        sizes = {name: getattr(self, name) for name in "TDSHEK"}
        dtype = str(self.dtype).removeprefix("torch.")
        return {**sizes, "F": self.F, "dtype": dtype, "routing": self.routing}

    def at(self, **changes) -> FFNShape:
        return replace(self, **changes)

    def gflop(self, neurons: int, products: int = 2) -> float:
        """`products` matrix products of all tokens with `neurons` neurons each."""
        return 2e-9 * products * self.T * self.D * neurons

    def gbyte(self, *elements: int) -> float:
        return 1e-9 * sum(elements) * self.dtype.itemsize

    def tensors(self, device, grad: bool = False, weights: bool = True) -> dict[str, torch.Tensor]:
        """Random x, router and (weights) w1, b1, w2, b2, scaled as a trained layer's are.

        x leans towards the router rows of the experts chosen for its token, so that whoever routes
        by these logits, ours or a peer, finds the same experts.
        """
        device = torch.device(device)
        g = torch.Generator(device).manual_seed(0)

        def draw(*size, scale=1.0, dtype=self.dtype):
            t = torch.empty(*size, dtype=torch.float32, device=device).normal_(generator=g)
            return (t * scale).to(dtype)

        router = draw(self.E, self.D, scale=0.02, dtype=torch.float32)
        x = draw(self.T, self.D, dtype=torch.float32)
        unit = router / router.square().sum(1, keepdim=True)
        spread = (x @ router.T).std()
        for rank, ids_T in enumerate(self.choices(device).unbind(1)):
            x += (_MARGIN - rank) * spread * unit[ids_T]
        p = {"x": x.to(self.dtype), "router": router}
        if weights:
            p |= {
                "w1": draw(self.F, self.D, scale=self.D**-0.5),
                "b1": draw(self.F, scale=0.02),
                "w2": draw(self.D, self.F, scale=self.F**-0.5),
                "b2": draw(self.D, scale=0.02),
            }
        return {name: t.requires_grad_(grad) for name, t in p.items()}

    def choices(self, device) -> torch.Tensor:
        """The experts of every token, [T, K]: dealt evenly, or drawn with Zipf's law."""
        g = torch.Generator(device).manual_seed(1)
        if self.routing == "balanced":
            # Slot s goes to expert s mod E, so every token's experts differ and counts are equal.
            tokens = torch.randperm(self.T, generator=g, device=device)
            return (tokens[:, None] * self.K + torch.arange(self.K, device=device)) % self.E
        _, _, exponent = self.routing.partition(":")
        ranks = torch.arange(1, self.E + 1, device=device, dtype=torch.float32)
        weights = ranks ** -float(exponent or ZIPF_EXPONENT)
        return torch.multinomial(weights.expand(self.T, -1), self.K, generator=g)


def flux(size: str, T: int = 4608) -> FFNShape:
    """The FFN of FLUX.1 (T = 4608 at 1024x1024); quick: fewer tokens, a third of the width."""
    if size == "tiny":
        return FFNShape(T=48, D=96, S=96, H=24)
    if size == "quick":
        return FFNShape(T=T // 8, D=1024, S=1536, H=384)
    return FFNShape(T=T)


def dit_xl(size: str, batch: int = 8) -> FFNShape:
    """The FFN of DiT-XL/2 at 256x256."""
    if size == "tiny":
        return FFNShape(T=32, D=96, S=96, H=24)
    return FFNShape(T=256 if size == "quick" else 256 * batch, D=1152, S=1152, H=288)


# Every shape by name, and which of them a size measures (a GPU measures all but when rehearsing).
NAMES = ("flux-4608", "flux-1536", "flux-512", "flux-18432", "dit-xl-8", "dit-xl-1", "dit-xl-64")
_MEASURED = {
    "tiny": ("flux-4608",),
    "quick": ("flux-4608", "dit-xl-8"),
    "default": ("flux-4608", "flux-512", "dit-xl-8"),
}


def named(name: str, size: str) -> FFNShape:
    """A shape by name: "flux-T" or "dit-xl-BATCH"."""
    family, _, count = name.rpartition("-")
    return {"flux": flux, "dit-xl": dit_xl}[family](size, int(count))


def measured(name: str, size: str, device: torch.device) -> bool:
    if device.type == "cuda" and size == "default":
        size = "full"
    return name in _MEASURED.get(size, NAMES)
