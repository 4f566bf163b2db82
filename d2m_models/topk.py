"""How many experts a token uses: set for a model, or scheduled over the steps of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from d2m_models.config import check_top_k
from d2m_models.moe import ExpertLayer


class TopKSchedule:
    """Sets `top_k` by the progress of sampling, e.g. few experts early and more late.

        schedule = TopKSchedule(pipe.transformer, [(0.0, 1), (0.5, 4)])
        pipe(prompt, callback_on_step_end=schedule)

    Steps are counted on the host, so no value is read back from the GPU; every new top_k compiles
    once under `torch.compile`.

    Args:
        model: any converted model; its top_k becomes the schedule's first value at once.
        values: (start, top_k) pairs; start is the fraction of steps done, the first 0, rising, and
            top_k what `set_top_k` takes.
    """

    def __init__(self, model: nn.Module, values: Sequence[tuple[float, Any]]):
        values = [tuple(pair) for pair in values]
        if not values or any(len(pair) != 2 for pair in values):
            raise ValueError(f"values must be (start, top_k) pairs, got {values}")
        starts = [start for start, _ in values]
        if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
            raise ValueError(f"starts must rise from 0 and stay below 1, got {starts}")
        layers = moe_layers(model)
        for _, top_k in values:  # all of them now, rather than in the midst of sampling
            if not isinstance(top_k, dict):
                for layer in layers.values():
                    check_top_k(top_k, layer.num_experts)
        self.model, self.values = model, values
        self.set(0.0)

    def at(self, progress: float) -> Any:
        """top_k when this fraction of the steps is done."""
        return next(top_k for start, top_k in reversed(self.values) if progress >= start - 1e-9)

    def set(self, progress: float) -> None:
        set_top_k(self.model, self.at(progress))

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        """diffusers' `callback_on_step_end`; after the last step the schedule starts over."""
        steps = pipe.num_timesteps
        self.set((step + 1) / steps if step + 1 < steps else 0.0)
        return kwargs


def moe_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Every MoE layer of a converted model by name."""
    return {
        name: m for name, m in model.named_modules() if isinstance(m, ExpertLayer) and m.num_experts
    }


def set_top_k(model: nn.Module, top_k: int | str | Mapping[str, int | str]) -> None:
    """Sets how many experts a token uses; nothing changes if any part of the request is wrong.

    Args:
        model: any converted model.
        top_k: 0..E, "dense", or {name: value}, where a name is an MoE layer
            ("transformer_blocks.3.ff") or a module that contains some ("transformer_blocks.3").
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers; convert it first")
    wanted = top_k if isinstance(top_k, Mapping) else {"": top_k}
    plan: dict[str, int | str] = {}
    for prefix, value in wanted.items():
        names = [n for n in layers if prefix in ("", n) or n.startswith(f"{prefix}.")]
        if not names:
            raise ValueError(
                f"top_k names {prefix!r}, which holds no MoE layer; layers: {list(layers)}"
            )
        for name in names:
            at = f"top_k for {name}" if prefix else "top_k"
            plan[name] = check_top_k(value, layers[name].num_experts, at)
    for name, value in plan.items():
        layers[name].top_k = value
