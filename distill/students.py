"""Students before their first stage: how neurons are dealt, routers start and blocks are grouped.

The paper's way is the default: neurons go by eq. (6), routers start at random. The other ways are
settings (`StudentConfig.initialisation`, `.routers`), and all callers come here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models import (
    FluxMoETransformer2DModel,
    coactivation_orders,
    convert_flux,
    fit_routers,
    neuron_order_from_importance,
    record_ffns,
)
from d2m_models.conversion.flux import ffn_widths, model_arguments, skeleton
from distill.configs.sections import StudentConfig
from distill.data.batch import Batch, generator
from distill.importance import taylor_importance

# --- measured on the teacher ----------------------------------------------------------------


def _calibration(
    teacher: nn.Module, source: Any, batches: int, seed: int, rows: int | None, size: int = 128
) -> Iterator[Batch | Iterator[Batch]]:
    """`batches` batches of `size` training samples; as their parts where `rows` are fewer."""
    device = next(teacher.parameters()).device

    def part(number: int, rows: slice | None = None) -> Batch:
        return source.batch(seed, number, size, "calibrate", rows).to(device)

    for number in range(batches):
        if rows is None or rows >= size:
            yield part(number)
        else:
            cuts = (slice(i, min(i + rows, size)) for i in range(0, size, rows))
            yield (part(number, cut) for cut in cuts)


@contextmanager
def _compute(teacher: nn.Module) -> Iterator[None]:
    """bf16 products where the teacher's weights are bf16, for batches are fp32."""
    weight = next(teacher.parameters())
    low = weight.dtype == torch.bfloat16
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
        yield


def measure_importance(
    teacher: nn.Module, source: Any, batches: int, seed: int, rows: int | None = None,
    size: int = 128,
) -> dict[str, Tensor]:  # fmt: skip
    """Eq. (6) over `batches` batches of `size` training samples, `rows` of them at a time; in bf16
    if the teacher is.

    A large teacher's blocks are recomputed in the backward pass.
    """
    large = sum(p.numel() for p in teacher.parameters()) > 1e9
    if large:
        teacher.enable_gradient_checkpointing()
    try:
        with _compute(teacher):
            parts = _calibration(teacher, source, batches, seed, rows, size)
            return taylor_importance(teacher, parts)
    finally:
        if large:
            teacher.disable_gradient_checkpointing()


def record_activations(
    teacher: nn.Module, source: Any, batches: int, seed: int, rows: int | None = None
) -> dict[str, Any]:
    """`d2m_models.record_ffns` on the samples that `measure_importance` sees."""

    def parts() -> Iterator[dict[str, Any]]:
        for batch in _calibration(teacher, source, batches, seed, rows):
            for part in [batch] if isinstance(batch, Batch) else batch:
                yield part.inputs()

    with _compute(teacher):
        return record_ffns(teacher, parts(), seed=seed)


def measure(teacher: nn.Module, source: Any, config: StudentConfig, seed: int) -> dict[str, Any]:
    """What `make_student` needs to know for these settings, and the settings: its keywords."""
    sizes = (config.importance_batches, seed, config.importance_rows)
    scored = config.initialisation != "random"
    recorded = config.initialisation == "coactivation" or config.routers == "fitted"
    return {
        "initialisation": config.initialisation,
        "routers": config.routers,
        "importance": measure_importance(teacher, source, *sizes) if scored else None,
        "records": record_activations(teacher, source, *sizes) if recorded else None,
    }


# --- students -------------------------------------------------------------------------------


def neuron_orders(
    teacher: nn.Module,
    structure: Any,
    importance: Mapping[str, Tensor] | None,
    seed: int,
    initialisation: str = "taylor",
    records: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """FFN name -> which neurons are shared and which expert has which of the others.

    taylor: the most important ones are shared, the rest dealt evenly to the experts (the paper's).
    random: the baseline of Table 5. coactivation: the most important ones are shared, those that
    fire together make an expert.
    """
    moe = structure.moe
    if initialisation == "coactivation":
        return coactivation_orders(records, importance, moe)
    scores = importance
    if initialisation == "random":
        gen, widths = generator(seed, "weights", 2), ffn_widths(teacher)
        scores = {name: torch.rand(width, generator=gen) for name, width in widths.items()}
    shared, _ = moe.sizes(teacher.inner_dim, 4 * teacher.inner_dim)
    return {
        name: neuron_order_from_importance(score, shared, moe.num_experts)
        for name, score in scores.items()
    }


def make_student(
    teacher: nn.Module,
    structure: Any,
    importance: Mapping[str, Tensor] | None,
    temb: Tensor | None,
    seed: int,
    *,
    initialisation: str = "taylor",
    routers: str = "random",
    records: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`convert_flux` with neurons in order and a calibrated AdaLN basis; MoB groups come later, in
    stage (c).

    Args:
        importance: eq. (6), not needed for initialisation "random".
        temb: calibration samples of the AdaLN basis, None where AdaLN stays whole.
        initialisation, routers: see `StudentConfig`.
        records: `record_activations`, for initialisation "coactivation" and routers "fitted".
    """
    orders = None
    if structure.moe is not None:
        orders = neuron_orders(teacher, structure, importance, seed, initialisation, records)
    student = convert_flux(
        teacher,
        replace(structure, mob=None),
        neuron_order=orders,
        adaln_calibration=temb if structure.adaln_dim is not None else None,
        generator=generator(seed, "weights"),
    ).to(next(teacher.parameters()).device)
    if routers == "fitted":
        fit_routers(student, records)
    return student


def group_blocks(model: nn.Module, mob: Any, seed: int) -> nn.Module:
    """A copy of the model with MoB groups and fresh block routers; no other weight changes."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return skeleton(model, replace(model.d2m_config, mob=mob))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights", 1).initial_seed())
        grouped = FluxMoETransformer2DModel(**{**model_arguments(model), "mob": mob.to_dict()})
    state = {k: v for k, v in grouped.state_dict().items() if k.startswith("mob_routers.")}
    state |= {k: v.clone() for k, v in model.state_dict().items()}
    grouped.load_state_dict(state)
    return grouped.to(device)
