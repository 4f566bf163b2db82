"""The paper's claims as comparisons of what `d2m ablate` measures, and claims.json made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from distill.configs.checked import to_dict
from distill.device import environment
from distill.study.claims import RULE, SCHEMA, Claim, judge, value_of
from distill.study.config import AblateConfig

MEASURES = {
    "rel_mse": "||student - teacher||^2 / ||teacher||^2 over held-out (x_t, t, prompt)",
    "flow_loss": "mean squared error to the data's velocity on the same triples",
    "sample_mse": "relative squared distance of samples to the teacher's from the same noise",
    "shared_only": "rel_mse with the shared experts alone, after stage (a)",
    "topK": "rel_mse of the trained MoE with K experts a token, not trained for it",
    "few_steps, many_steps": "relative squared distance of samples in few (many) Euler steps to "
    "the original teacher's in many",
    "prompt, timestep, token": "Fig. 3: share of the variance of a block's log MSE explained; "
    "Fig. 6: total variation between an average group's choices and the mean's; *_chance: the same "
    "with labels in random order",
}

CLAIMS = (
    Claim("MoE at r_a 1.5 is nearer the teacher than Diff-Pruning at 1.5", "Table 2",
          "moe", "prune-mlp-1.5"),
    Claim("MoE at r_a 1.5 is nearer the teacher than Diff-Pruning at 2", "Table 2",
          "moe", "prune-mlp-2"),
    Claim("MoE at r_a 1.5 is nearer than Diff-Pruning at 1.5, after 4 times the steps",
          "Table 2, longer", "moe-long", "prune-mlp-1.5-long"),
    Claim("MoB is nearer than BK, shallow (double blocks grouped)", "Table 3",
          "mob-shallow", "bk-shallow"),
    Claim("MoB is nearer than Lite, shallow", "Table 3", "mob-shallow", "lite-shallow"),
    Claim("MoB is nearer than BK, deep (single blocks too)", "Table 3", "mob-deep", "bk-deep"),
    Claim("MoB is nearer than Lite, deep", "Table 3", "mob-deep", "lite-deep"),
    Claim("MoB is nearer than BK, deep, if its isolated blocks train too",
          "Table 3, another recipe", "mob-all-deep", "bk-deep"),
    Claim("1S12E2A is nearer than 0.5S14E4A, shared experts only", "Table 4",
          "moe:shared_only", "moe-half:shared_only"),
    Claim("1S12E2A is nearer than 0.5S14E4A, whole MoE", "Table 4", "moe", "moe-half"),
    Claim("Taylor initialisation is nearer than random (shared experts)", "Table 5",
          "moe:shared_only", "random:shared_only"),
    Claim("Separate training of shared and normal experts is nearer than joint", "Table 5",
          "moe", "joint"),
    Claim("4 groups of 3 are nearer than 2 of 6", "Fig. 5", "groups-4x3", "groups-2x6"),
    Claim("2 groups of 6 are nearer than 1 of 12", "Fig. 5", "groups-2x6", "groups-1x12"),
    Claim("Top-k 1 is nearer than 0, without training", "Fig. 8", "moe:top1", "moe:top0"),
    Claim("Top-k 2 is nearer than 1", "Fig. 8", "moe:top2", "moe:top1"),
    Claim("Top-k 4 is nearer than 2", "Fig. 8", "moe:top4", "moe:top2"),
    Claim("Top-k 12 is nearer than 4", "Fig. 8", "moe:top12", "moe:top4"),
    Claim("A block's MSE varies by prompt", "Fig. 3",
          "teacher:prompt_chance", "teacher:prompt", "linear"),
    Claim("A block's MSE varies by timestep", "Fig. 3",
          "teacher:timestep_chance", "teacher:timestep", "linear"),
    Claim("Expert selection differs by prompt", "Fig. 6", "moe:prompt_chance", "moe:prompt",
          "linear"),
    Claim("Expert selection differs by timestep", "Fig. 6", "moe:timestep_chance", "moe:timestep",
          "linear"),
    Claim("Expert selection differs by token position", "Figs. 6, 7", "moe:token_chance",
          "moe:token", "linear"),
    Claim("Selection is most concentrated at the first step", "Fig. 6",
          "moe:entropy_first", "moe:entropy_rest", "linear"),
    Claim("In few steps, the step-distilled teacher's MoE is nearer than the original's", "Table 1",
          "hyper-moe:few_steps", "moe:few_steps"),
    Claim("The step-distilled teacher's MoE in few steps is nearer than the original's in many",
          "Table 1", "hyper-moe:few_steps", "moe:many_steps"),
)  # fmt: skip

# the known order against which the setting is checked before any verdict is believed
SEPARATED = ("prune-mlp-2", "prune-mlp-1.5", "bk-shallow", "bk-deep")


def separation(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Gap between the dense model and each pruned one, in standard deviations over seeds."""

    def gap(name: str, value: str) -> dict[str, float | None]:
        pruned = [value_of(row, f"{name}:{value}") for row in rows.values()]
        found = mean(pruned) - mean(value_of(row, f"teacher:{value}") for row in rows.values())
        if not math.isfinite(found):
            return dict.fromkeys(("gap", "spread", "gap_over_spread"))
        spread = stdev(pruned) if len(pruned) > 1 else None
        ratio = found / spread if spread else None
        return {"gap": found, "spread": spread, "gap_over_spread": ratio}

    return {name: {v: gap(name, v) for v in ("rel_mse", "flow_loss")} for name in SEPARATED}


def collect(
    config: AblateConfig,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rates: Mapping[str, float],
    tried: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The content of claims.json from rows[seed][comparator][value]."""
    return {
        "schema": SCHEMA,
        "complete": all(values for row in rows.values() for values in row.values()),
        "claims": [judge(claim, rows) for claim in CLAIMS],
        "rule": RULE,
        "measures": MEASURES,
        "seeds": [int(seed) for seed in rows],
        "separation": separation(rows),
        "rates": {"chosen": dict(rates), "tried": dict(tried)},
        "runs": {seed: dict(row) for seed, row in rows.items()},
        "config": to_dict(config),
        "environment": environment("cpu"),
    }
