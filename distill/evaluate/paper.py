"""The paper's Table 1 (arXiv 2510.09094): 1024x1024, guidance 3.5, one H20, as published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """nfe: steps. flops_t: 1e12 a forward, in the paper's own convention. latency_s: one image.
    quality: as `QUALITY` orders it."""

    name: str
    preset: str  # ours with this structure; "flux-dense" is the unconverted model
    nfe: int
    flops_t: float
    activated_b: float
    latency_s: float
    quality: tuple[float, ...]


# Column of scores.json -> its heading in the table.
QUALITY = {"clip": "CLIP", "image_reward": "IR", "mps": "MPS", "geneval": "GenEval", "dpg": "DPG",
           "b_vqa": "B-VQA", "unidet": "UniDet", "s_cot": "S-CoT"}  # fmt: skip

TABLE1 = (
    PaperRow("FLUX.1 [dev]", "flux-dense", 28, 66.0, 11.9, 21.2,
             (32.24, 0.9656, 13.09, 0.6595, 83.42, 0.6401, 0.4262, 78.57)),
    PaperRow("HyperFLUX", "flux-dense", 8, 66.0, 11.9, 6.06,
             (32.19, 0.9859, 13.22, 0.6669, 83.25, 0.6270, 0.4375, 78.91)),
    PaperRow("FLUX.1-Lite", "flux-lite", 28, 53.15, 8.16, 17.24,
             (31.79, 0.8380, 12.87, 0.5229, 79.00, 0.5471, 0.3785, 77.62)),
    PaperRow("FLUX.1-MoE-L", "flux-moe-l", 28, 43.42, 5.15, 17.8,
             (31.39, 0.8011, 12.60, 0.5702, 81.63, 0.6032, 0.3899, 78.28)),
    PaperRow("HyperFLUX-MoE-L", "flux-moe-l", 8, 43.42, 5.15, 5.09,
             (31.50, 0.8257, 12.74, 0.5917, 81.76, 0.5959, 0.3914, 78.13)),
    PaperRow("FLUX.1-MoE-M", "flux-moe-m", 28, 35.7, 4.01, 14.37,
             (30.77, 0.5969, 12.19, 0.4758, 76.26, 0.4947, 0.3400, 77.50)),
    PaperRow("FLUX-Mini", "flux-mini", 50, 17.37, 3.18, 10.3,
             (29.94, 0.2151, 11.18, 0.3209, 69.34, 0.4209, 0.2845, 75.86)),
    PaperRow("FLUX.1-MoE-S", "flux-moe-s", 28, 26.43, 3.19, 9.57,
             (30.67, 0.5942, 12.06, 0.4441, 75.61, 0.4958, 0.3266, 77.03)),
    PaperRow("FLUX.1-MoE-XS", "flux-moe-xs", 28, 20.26, 2.64, 8.74,
             (30.40, 0.5076, 11.80, 0.4036, 73.66, 0.4734, 0.3108, 76.25)),
    PaperRow("HyperFLUX-MoE-XS", "flux-moe-xs", 8, 20.26, 2.64, 2.5,
             (30.70, 0.5320, 11.76, 0.4117, 74.53, 0.4859, 0.3036, 76.88)),
)  # fmt: skip
DENSE = TABLE1[0]


def first_row(preset: str) -> PaperRow:
    """The table's first row (most steps) of a structure."""
    return next(row for row in TABLE1 if row.preset == preset)


def row_of(preset: str | None, nfe: int) -> PaperRow | None:
    """The row of this structure and number of steps, if the paper has it."""
    return next((row for row in TABLE1 if (row.preset, row.nfe) == (preset, nfe)), None)
