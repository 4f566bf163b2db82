"""The three stages of section 3.2 and the students they train.

(a) "shared": the neurons of highest Taylor score become the shared experts, which alone run and
    learn (top_k = 0);
(b) "moe": shared experts frozen, the rest learns, with load balancing over experts;
(c) "mob": MoE blocks grouped, each group learns to imitate the group's last dense block, isolated
    blocks frozen, with load balancing over blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import checkpoint as ckpt
from distill.config import StageConfig, settings
from distill.data import Batch, generator
from distill.importance import taylor_importance
from distill.objective import Distillation
from distill.optimizer import FrozenSlice
from distill.parallel import World, shard_copy
from distill.train import Preview, train

VERSION = 1  # raise when a change makes old checkpoints mean something else


# --- students -------------------------------------------------------------------------------


def measure_importance(
    teacher: nn.Module, source: Any, batches: int, seed: int, rows: int | None = None
) -> dict[str, Tensor]:
    """Eq. (6) over `batches` batches of 128 training samples, `rows` of them at a time; in bf16 if
    the teacher is.

    A large teacher's blocks are recomputed in the backward pass.
    """
    weight, size = next(teacher.parameters()), 128
    device, low = weight.device, weight.dtype == torch.bfloat16

    def batch(number: int) -> Batch | Iterator[Batch]:
        if rows is None or rows >= size:
            return source.batch(seed, number, size, "calibrate").to(device)
        cuts = (slice(i, min(i + rows, size)) for i in range(0, size, rows))
        return (source.batch(seed, number, size, "calibrate", cut).to(device) for cut in cuts)

    large = sum(p.numel() for p in teacher.parameters()) > 1e9
    if large:
        teacher.enable_gradient_checkpointing()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            return taylor_importance(teacher, map(batch, range(batches)))
    finally:
        if large:
            teacher.disable_gradient_checkpointing()


def neuron_orders(
    teacher: nn.Module, structure: Any, importance: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Each FFN's neurons: the most important ones shared, the rest dealt evenly to the experts."""
    from d2m_models import neuron_order_from_importance

    shared, _ = structure.moe.sizes(teacher.inner_dim, 4 * teacher.inner_dim)
    return {
        name: neuron_order_from_importance(score, shared, structure.moe.num_experts)
        for name, score in importance.items()
    }


def make_student(
    teacher: nn.Module,
    structure: Any,
    importance: Mapping[str, Tensor],
    temb: Tensor | None,
    seed: int,
) -> nn.Module:
    """`convert_flux` with Taylor orders and a calibrated AdaLN basis; MoB groups come later, in
    stage (c).
    """
    from d2m_models import convert_flux

    return convert_flux(
        teacher,
        replace(structure, mob=None),
        neuron_order=None
        if structure.moe is None
        else neuron_orders(teacher, structure, importance),
        adaln_calibration=temb if structure.adaln_dim is not None else None,
        generator=generator(seed, "weights"),
    ).to(next(teacher.parameters()).device)


def student_skeleton(teacher: nn.Module, structure: Any) -> nn.Module:
    """The student that `convert_flux` would make, on the meta device."""
    from d2m_models import FluxMoETransformer2DModel
    from d2m_models.conversion import model_arguments

    with torch.device("meta"):
        return FluxMoETransformer2DModel(**model_arguments(teacher, structure))


def group_blocks(model: nn.Module, mob: Any, seed: int) -> nn.Module:
    """A copy of the model with MoB groups and fresh block routers; no other weight changes."""
    from d2m_models import FluxMoETransformer2DModel
    from d2m_models.conversion import model_arguments

    device = next(model.parameters()).device
    if device.type == "meta":
        return student_skeleton(model, replace(model.d2m_config, mob=mob))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights", 1).initial_seed())
        grouped = FluxMoETransformer2DModel(**{**model_arguments(model), "mob": mob.to_dict()})
    state = {k: v for k, v in grouped.state_dict().items() if k.startswith("mob_routers.")}
    state |= {k: v.clone() for k, v in model.state_dict().items()}
    grouped.load_state_dict(state)
    return grouped.to(device)


# --- what trains in a stage -----------------------------------------------------------------


def ffn_slices(model: nn.Module, part: str) -> list[FrozenSlice]:
    """The "shared" or "experts" part of every MoE layer's w1 rows, b1 entries and w2 columns."""
    from d2m_models import moe_layers
    from d2m_models.conversion import ffn_tensors

    shapes = {name: p.shape for name, p in model.named_parameters()}
    slices = []
    for name, layer in moe_layers(model).items():
        hidden = layer.neuron_order.numel()
        for key, dim, _ in ffn_tensors(name):
            first = shapes[key][dim] - hidden  # proj_out: the attention's columns come first
            start, stop = (0, layer.shared) if part == "shared" else (layer.shared, hidden)
            slices.append(FrozenSlice(key, dim, first + start, first + stop))
    return slices


def prepare_stage(
    model: nn.Module, stage: str, *, freeze_shared: bool = True, train_isolated: bool = False
) -> list[FrozenSlice]:
    """Set what runs and learns in a stage; returns the parts of parameters that must not move."""
    from d2m_models import moe_layers, set_top_k
    from d2m_models.output import group_names

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
    for prefix in ("transformer_blocks", "single_transformer_blocks"):
        for i, block in enumerate(getattr(model, prefix)):
            block.requires_grad_(train_isolated or f"{prefix}.{i}" in grouped)
    return []


def finish_stage(model: nn.Module) -> None:
    """Back to inference: the configured top_k, nothing frozen, no gradients wanted."""
    from d2m_models import moe_layers, set_top_k

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

    def prepare(student: nn.Module) -> list[FrozenSlice]:
        return prepare_stage(
            student,
            config.stage,
            freeze_shared=config.freeze_shared,
            train_isolated=config.train_isolated,
        )

    done = (Path(folder) / "model.safetensors").exists()
    trained, frozen = model, prepare(model)
    if world.size > 1 and not done:
        trained, frozen = shard_copy(model, world, prepare)
    features = None
    if config.stage == "mob":
        from d2m_models.output import group_names

        features = list(group_names(model.d2m_config))
    run_id = ckpt.fingerprint(
        VERSION, parent, settings(config), model.d2m_config.to_dict(), seed, first
    )
    objective = Distillation(
        teacher, trained, source, config.loss, config.train.batch_size, seed, first, features
    )
    options = {"run_id": run_id, "label": label, "accept_changed": accept_changed}
    train(
        trained,
        objective,
        config.train,
        folder,
        frozen=frozen,
        progress=progress,
        world=world,
        preview=preview,
        **options,
    )
    if world.size > 1:  # the result, whole, from where rank 0 has put it
        del trained, objective
        world.barrier()
        if next(model.parameters()).device.type != "meta":
            train(model, lambda step: {}, config.train, folder, **options)
    finish_stage(model)
    return run_id
