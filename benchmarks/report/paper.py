"""The paper's Table 1 (arXiv 2510.09094): 1024x1024, guidance 3.5, one H20, as published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """nfe: steps. flops_t: 1e12 a forward, in the paper's own convention. latency_s: one image."""

    name: str
    preset: str  # ours with this structure; "flux-dense" is the unconverted model
    nfe: int
    flops_t: float
    activated_b: float
    latency_s: float


TABLE1 = (
    PaperRow("FLUX.1 [dev]", "flux-dense", 28, 66.0, 11.9, 21.2),
    PaperRow("HyperFLUX", "flux-dense", 8, 66.0, 11.9, 6.06),
    PaperRow("FLUX.1-Lite", "flux-lite", 28, 53.15, 8.16, 17.24),
    PaperRow("FLUX.1-MoE-L", "flux-moe-l", 28, 43.42, 5.15, 17.8),
    PaperRow("HyperFLUX-MoE-L", "flux-moe-l", 8, 43.42, 5.15, 5.09),
    PaperRow("FLUX.1-MoE-M", "flux-moe-m", 28, 35.7, 4.01, 14.37),
    PaperRow("FLUX-Mini", "flux-mini", 50, 17.37, 3.18, 10.3),
    PaperRow("FLUX.1-MoE-S", "flux-moe-s", 28, 26.43, 3.19, 9.57),
    PaperRow("FLUX.1-MoE-XS", "flux-moe-xs", 28, 20.26, 2.64, 8.74),
    PaperRow("HyperFLUX-MoE-XS", "flux-moe-xs", 8, 20.26, 2.64, 2.5),
)
DENSE = TABLE1[0]


def first_row(preset: str) -> PaperRow:
    """The table's first row (most steps) of a structure."""
    return next(row for row in TABLE1 if row.preset == preset)
