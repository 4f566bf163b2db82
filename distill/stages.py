"""The three stages of section 3.2.

(a) "shared": the neurons of highest Taylor score become the shared experts, which alone run and
    learn (top_k = 0);
(b) "moe": shared experts frozen, the rest learns, with load balancing over experts;
(c) "mob": MoE blocks grouped, each group learns to imitate the group's last dense block, isolated
    blocks frozen, with load balancing over blocks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from d2m_models import moe_layers, set_top_k
from d2m_models.config import group_names, named_blocks
from d2m_models.conversion.any_model import neuron_places
from distill import files as ckpt
from distill.configs.sections import StageConfig
from distill.configs.training import settings
from distill.loop.objective import Distillation
from distill.loop.optimizer import FrozenSlice
from distill.loop.parallel import World, shard_copy
from distill.loop.train import RESULT, Preview, load_result, train

VERSION = 1  # raise when a change makes old checkpoints mean something else


# --- what trains in a stage -----------------------------------------------------------------


def ffn_slices(model: nn.Module, part: str) -> list[FrozenSlice]:
    """The "shared" or "experts" part of every MoE layer's w1 rows, b1 entries and w2 columns."""
    slices = []
    for name, layer in moe_layers(model).items():
        hidden = layer.neuron_order.numel()
        start, stop = (0, layer.shared) if part == "shared" else (layer.shared, hidden)
        for key, dim, first in neuron_places(name, layer):
            slices.append(FrozenSlice(key, dim, first + start, first + stop))
    return slices


def prepare_stage(
    model: nn.Module, stage: str, *, freeze_shared: bool = True, train_isolated: bool = False
) -> list[FrozenSlice]:
    """Set what runs and learns in a stage; returns the parts of parameters that must not move."""
    structure = model.d2m_config
    model.train().requires_grad_(True)
    layers = moe_layers(model)
    if layers:
        set_top_k(model, 0 if stage == "shared" else structure.moe.top_k)
    for layer in layers.values():
        layer.freeze_shared = stage == "moe" and freeze_shared
        layer.router.requires_grad_(stage != "shared")
    if stage == "shared":
        return ffn_slices(model, "experts")
    if stage == "moe":
        return ffn_slices(model, "shared") if freeze_shared else []
    # Isolated blocks are frozen; embedders, the AdaLN projection and the output head are no blocks.
    grouped = {name for names in group_names(structure).values() for name in names}
    for name, block in named_blocks(model).items():
        block.requires_grad_(train_isolated or name in grouped)
    return []


def finish_stage(model: nn.Module) -> None:
    """Back to inference: the configured top_k, nothing frozen, no gradients wanted."""
    layers = moe_layers(model)
    if layers:
        set_top_k(model, model.d2m_config.moe.top_k)
    for layer in layers.values():
        layer.freeze_shared = False
    model.eval().requires_grad_(False)


# --- running a stage ------------------------------------------------------------------------


def run_stage(
    model: nn.Module,
    teacher: nn.Module,
    source: Any,
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    first: int,
    parent: str,
    label: str,
    progress: bool = True,
    world: World | None = None,
    accept_changed: bool = False,
    preview: Preview | None = None,
) -> str:
    """Train one stage in place (or load its result) and return its fingerprint, the next stage's
    parent.

    Args:
        world: with several ranks the teacher is sharded, the model whole and on the CPU; rank 0's
            is what counts, the others' may be on the meta device. A sharded copy is trained, and
            its result loaded into the model.
        accept_changed, preview: see `train`.
    """
    world = world or World(device=next(model.parameters()).device)

    prepare = partial(
        prepare_stage,
        stage=config.stage,
        freeze_shared=config.freeze_shared,
        train_isolated=config.train_isolated,
    )
    done = (Path(folder) / RESULT).exists()
    trained, frozen = model, prepare(model)
    if world.size > 1 and not done:
        trained, frozen = shard_copy(model, world, prepare)
    features = list(group_names(model.d2m_config)) if config.stage == "mob" else None
    run_id = ckpt.fingerprint(
        VERSION, parent, settings(config), model.d2m_config.to_dict(), seed, first
    )
    objective = Distillation(
        teacher, trained, source, config.loss, config.train.batch_size, seed, first, features
    )
    options = {"progress": progress, "world": world, "preview": preview, "frozen": frozen}
    options |= {"run_id": run_id, "label": label, "accept_changed": accept_changed}
    train(trained, objective, config.train, folder, **options)
    if world.size > 1:  # the result, whole, from where rank 0 has put it
        del trained, objective
        world.barrier()
        if next(model.parameters()).device.type != "meta":
            load_result(model, folder, run_id, accept_changed)
    finish_stage(model)
    return run_id
