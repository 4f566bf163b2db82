"""AdamW, its schedule, partly frozen parameters and averaged weights.

Everything here acts on what a rank holds of each parameter, so it is the same sharded or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2m_models import private
from distill.configs.training import TrainConfig
from distill.errors import UserError
from distill.loop.parallel import local, local_span


@dataclass(frozen=True)
class FrozenSlice:
    """Part of a parameter that must not move: entries start..stop along dim."""

    name: str
    dim: int
    start: int
    stop: int


def learning_rate(config: TrainConfig, step: int) -> float:
    """Factor on lr at `step` (0-based): linear warm-up, then constant or a cosine to 0."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def make_optimizer(
    model: nn.Module, config: TrainConfig, frozen: Sequence[FrozenSlice] = ()
) -> torch.optim.Optimizer:
    """AdamW with fresh state; `optimizer: adamw8bit` keeps both moments in 8 bits (torchao).

    A partly frozen parameter gets no weight decay from AdamW: its frozen slice has zero gradient,
    so Adam's own step is exactly zero there, but decay would move it (1.2% in 200 steps). The slice
    that trains is decayed by `decay_trained_slices`.
    """
    sliced = {f.name for f in frozen}
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # routers, biases and norms are not decayed
            router = "router" in name.split(".") or "mob_routers" in name
            decay = 0.0 if name in sliced or p.ndim < 2 or router else config.weight_decay
            found.setdefault((router, decay), []).append(p)
    groups = [
        {"params": p, "weight_decay": decay, "scale": config.router_lr_scale if router else 1.0}
        for (router, decay), p in found.items()
    ]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if config.optimizer == "adamw":
        # fused: a loop over so many small tensors costs more than the arithmetic
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as err:
        raise UserError(
            "train.optimizer 'adamw8bit' needs the package torchao: pip install 'dense2moe[8bit]'"
        ) from err
    return AdamW8bit(groups, **options)


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state as it is before the first step, so that it can be loaded into."""
    groups = optimizer.param_groups
    before = [(float(group["lr"]), group["weight_decay"]) for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
        set_rate(group, 0.0)
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()  # with no gradient, rate or decay nothing moves
    optimizer.zero_grad(set_to_none=True)
    for group, (lr, decay) in zip(groups, before, strict=True):
        group["weight_decay"] = decay
        set_rate(group, lr)
    for state in optimizer.state.values():
        state["step"] = state["step"] * 0


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> dict[str, Tensor]:
    """State tensors as "<parameter>/<key>"; names: id of parameter -> its name.

    A moment in 8 bits is stored as the plain tensors it is made of: "<parameter>/<key>.codes", ...
    """
    found: dict[str, Tensor] = {}
    for p, entry in optimizer.state.items():
        for key, value in entry.items():
            name = f"{names[id(p)]}/{key}"
            if hasattr(value, "__tensor_flatten__") and not hasattr(value, "to_local"):
                for part in value.__tensor_flatten__()[0]:
                    found[f"{name}.{part}"] = getattr(value, part)
            elif isinstance(value, Tensor):
                found[name] = value
    return found


def set_rate(group: dict, rate: float) -> None:
    """Set a parameter group's learning rate, which torchao keeps in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@torch.no_grad()
def decay_trained_slices(
    params: dict[str, nn.Parameter], frozen: Sequence[FrozenSlice], lr: float, weight_decay: float
) -> None:
    """AdamW's decay, p *= 1 - lr * weight_decay, on the part of each matrix that is not frozen.

    A fused gate's matrix has two frozen slices.
    """
    of: dict[tuple[str, int], list[FrozenSlice]] = {}
    for f in frozen:
        of.setdefault((f.name, f.dim), []).append(f)
    for (name, dim), slices in of.items():
        p = params[name]
        if p.ndim < 2 or not weight_decay:
            continue
        ends = [at for f in sorted(slices, key=lambda f: f.start) for at in (f.start, f.stop)]
        edges = [0, *ends, p.shape[dim]]
        for span in zip(edges[0::2], edges[1::2], strict=True):
            start, stop = local_span(p, dim, *span)
            if stop > start:
                local(p.detach()).narrow(dim, start, stop - start).mul_(1 - lr * weight_decay)


@torch.no_grad()
def gradient_norm(params: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of the whole gradient, over all ranks; a scalar."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def clip_gradients(params: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale the gradient down to `limit` where its norm is larger; 0 means no limit."""
    if limit:
        grads = [local(p.grad) for p in params if p.grad is not None]
        private.foreach("mul_", grads, torch.clamp(limit / (norm + 1e-6), max=1.0))


class Average:
    """Exponential moving average of the trainable weights, in fp32, with a short memory at first.

    a <- a + (1 - d) (w - a),   d = min(decay, step / (step + 10))
    """

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float | None):
        self.params, self.decay = params, decay
        self.values = {n: p.detach().clone() for n, p in params.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.values:
            weight = 1 - min(self.decay or 0.0, step / (step + 10))
            now = [local(p.detach()) for p in self.params.values()]
            private.foreach("lerp_", [local(v) for v in self.values.values()], now, weight)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averaged weights in place of the parameters."""
        for name, value in self.values.items():
            local(self.params[name].detach()).copy_(local(value))
