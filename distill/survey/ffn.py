"""What an FFN loses in closed form: as a linear map, pruned, and as a mixture of experts.

Shapes: n tokens, D width, F neurons.

Every form that is compared computes y = (g(x) * h(x)) W + b with h the dense FFN's own activations,
gates g that say which neurons are active for a token, and W, b by least squares on one sample of
tokens; its error is what it leaves unexplained of the FFN's output on another sample. So the
comparison is of structures, at equal activated neurons, each with the best output weights that it
can have; no form is favoured by where it starts. Mixtures are started as a student is
(`start_ffn`). Training moves all of them further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2m_models.config import MoEConfig
from d2m_models.conversion.formation import FFNRecord
from d2m_models.conversion.least_squares import contribution, least_squares, unexplained
from d2m_models.conversion.start import FORMATIONS, outputs, start_ffn


class Sample(NamedTuple):
    """Tokens of one FFN: x [n, D], h [n, F], y = h w2 [n, D]."""

    x: Tensor
    h: Tensor
    y: Tensor

    @classmethod
    def of(cls, record: FFNRecord, w2_DF: Tensor) -> Sample:
        """The sample on the weight's device; the output bias, which nothing changes, left out."""
        x, h = (t.to(w2_DF.device, torch.float32) for t in record)
        return cls(x, h, h @ w2_DF.float().t())


def survey_ffn(
    fit: Sample, judge: Sample, w2_DF: Tensor, ratios: Sequence[float],
    candidates: Sequence[MoEConfig], generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Relative errors of one FFN.

    Args:
        fit, judge: different tokens. ratios: activated expansion ratios r_a of pruning.
        candidates: mixtures; their top_k is a number.

    Returns:
        {"linear": error of a linear map, "pruned": {r_a: error}, "mixtures": [{"moe", "ratio",
        "formation", "error", "pruned": the error of pruning at its ratio}, ...]}
    """
    score_F = contribution(fit.h, w2_DF)
    order_F = score_F.argsort(descending=True, stable=True)
    width = fit.x.shape[1]

    def pruned(ratio: float) -> float:
        kept = order_F[: round(ratio * width)]
        return unexplained(least_squares(fit.h[:, kept], fit.y)(judge.h[:, kept]), judge.y)

    errors = {ratio: pruned(ratio) for ratio in ratios}
    mixtures = []
    for moe in candidates:
        ratio = moe.activated_ratio
        if ratio not in errors:
            errors[ratio] = pruned(ratio)
        for formation in FORMATIONS:
            start = start_ffn(FFNRecord(fit.x, fit.h), score_F, w2_DF, moe, formation, generator)
            given = outputs(start, FFNRecord(judge.x, judge.h), w2_DF, moe)
            error = unexplained(given, judge.y)
            mixtures.append({"moe": moe.to_dict(), "ratio": ratio, "formation": formation,
                             "error": error, "pruned": errors[ratio]})  # fmt: skip
    linear = unexplained(least_squares(fit.x, fit.y)(judge.x), judge.y)
    return {"linear": linear, "pruned": dict(sorted(errors.items())), "mixtures": mixtures}
