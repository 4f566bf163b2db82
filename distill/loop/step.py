"""One step's gradient: in parts, on several ranks, in bf16 if wanted; the same but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from d2m_models import private
from d2m_models.config import named_blocks
from distill import files as ckpt
from distill.configs.training import TrainConfig
from distill.loop.objective import Distillation, Statistics
from distill.loop.parallel import World


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """bf16 products on fp32 weights.

    Without autocast's cache, which would keep a bf16 copy of every weight until the step ends.
    """
    if config.compute_dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def backward(
    objective: Any, step: int, config: TrainConfig, world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of batch number `step`; returns (loss and its parts, slots that chose each expert).

    With one part: forward, statistics over ranks, loss, backward. With several: all parts' forwards
    without gradient give the statistics, then each part's forward and backward.
    """
    if not isinstance(objective, Distillation):
        with autocast(config, world.device):
            parts = objective(step)
        parts["loss"].backward()
        return {k: v.detach() for k, v in parts.items()}, {}
    rows = world.rows(config.batch_size, config.micro_batch)
    whole = None
    if len(rows) > 1:
        with torch.no_grad(), autocast(config, world.device):
            each = [objective.terms(objective.batch(step, r)).statistics for r in rows]
        whole = Statistics.combine(each, world)
    sums: dict[str, Tensor] = {}
    for r in rows:
        alone = world.size == 1 and len(rows) == 1
        with autocast(config, world.device):
            terms = objective.terms(objective.batch(step, None if alone else r))
            if whole is None:
                whole = Statistics.combine([terms.statistics], world)
            parts = objective.loss(terms, whole)
        # FSDP takes the mean over ranks; the ranks' shares add up
        (parts["loss"] * world.size if world.size > 1 else parts["loss"]).backward()
        sums = {k: v.detach() + sums.get(k, 0) for k, v in parts.items()}
    assert whole is not None
    names = list(sums)
    totals = world.sum(torch.stack([sums[k] for k in names]))
    return dict(zip(names, totals.unbind(), strict=True)), whole.loads


def _recomputed(forward: Callable) -> Callable:
    """`forward` as gradient checkpointing for `torch.compile`: all but the routing is recomputed.

    Around a compiled block it does not work: the first pass routes and the recomputation is given
    the routing, which makes two graphs, and they do not save the same tensors.
    """
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.d2m.route.default])

    def run(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, context_fn=keep, **kwargs)

    return run


@contextmanager
def sped_up(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing and torch.compile on the model's blocks, as configured, inside.

    Both are undone at the end: the next stage trains the same model by its own settings.

    Blocks share graphs; one that is frozen or runs other samples than the last needs another.
    Beyond torch's limit of 8 graphs a block would run without; hence a higher limit. Blocks of a
    MoB group run any number of samples: sizes are symbols from the start, so that there are few.
    """
    blocks = named_blocks(model).values() if config.compile else ()
    compiled = [(block, block.__dict__.get("forward")) for block in blocks]
    structure = getattr(model, "d2m_config", None)
    any_batch = True if structure is not None and structure.mob is not None else None
    outside = config.gradient_checkpointing and not compiled
    try:
        if outside:
            model.enable_gradient_checkpointing()
        for block, _ in compiled:
            # the method, not the module: parameters keep their names, hooks (FSDP's) stay outside
            forward = _recomputed(block.forward) if config.gradient_checkpointing else block.forward
            block.forward = torch.compile(forward, dynamic=any_batch)
        with private.many_graphs() if compiled else nullcontext():
            yield
    finally:
        for block, forward in compiled:
            block.__dict__.pop("forward", None)  # the class's own again
            if forward is not None:
                block.forward = forward
        if outside:
            model.disable_gradient_checkpointing()


def dump_batch(objective: Any, step: int, config: TrainConfig, folder: Path, world: World) -> str:
    """Write this rank's rows of a batch; returns a sentence that says where they are."""
    if not isinstance(objective, Distillation):
        return f"The batch is number {step}."
    rows = world.rows(config.batch_size)[0]
    batch = objective.batch(step, rows)
    names = [*batch.PER_SAMPLE, "img_ids", "txt_ids"]
    tensors = {n: getattr(batch, n) for n in names if getattr(batch, n) is not None}
    suffix = f"-rank{world.rank}" if world.size > 1 else ""
    path = folder / f"bad-batch-{step}{suffix}.safetensors"
    ckpt.save_tensors(path, tensors, {"step": step, "first_row": rows.start})
    return f"Its batch is in {path}."
