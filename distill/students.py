"""Students before their first stage: how neurons are dealt, routers start and blocks are grouped.

The paper's way is the default: neurons go by eq. (6), routers start at random. The other ways are
settings (`StudentConfig.initialisation`, `.routers`), and all callers come here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models import (
    FluxMoETransformer2DModel,
    convert_flux,
    moe_layers,
    neuron_order_from_importance,
)
from d2m_models.config import AnyMoEConfig, GroupsConfig
from d2m_models.conversion.any_model import convert_any, ffns, group_any
from d2m_models.conversion.flux import ffn_linears, model_arguments, skeleton
from d2m_models.conversion.formation import each_record
from d2m_models.conversion.least_squares import least_squares, unexplained
from d2m_models.conversion.start import Start, outputs, start_ffn
from distill.configs.sections import StudentConfig
from distill.data.batch import Batch, generator
from distill.importance import ffn_places, taylor_importance

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


def _inputs(*calibration: Any) -> Iterator[dict[str, Any]]:
    """What the model is given for the samples of `_calibration`, in as many parts."""
    for batch in _calibration(*calibration):
        for part in [batch] if isinstance(batch, Batch) else batch:
            yield part.inputs()


@contextmanager
def _compute(teacher: nn.Module) -> Iterator[None]:
    """bf16 products where the teacher's weights are bf16, for batches are fp32."""
    weight = next(teacher.parameters())
    low = weight.dtype == torch.bfloat16
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
        yield


def measure_importance(
    teacher: nn.Module, source: Any, batches: int, seed: int, rows: int | None = None,
    size: int = 128, structure: Any = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Eq. (6) over `batches` batches of `size` training samples, `rows` of them at a time; in bf16
    if the teacher is. `structure`: see `distill.importance.ffn_places`.

    A large teacher's blocks are recomputed in the backward pass.
    """
    large = sum(p.numel() for p in teacher.parameters()) > 1e9
    if large:
        teacher.enable_gradient_checkpointing()
    try:
        with _compute(teacher):
            parts = _calibration(teacher, source, batches, seed, rows, size)
            return taylor_importance(teacher, parts, structure)
    finally:
        if large:
            teacher.disable_gradient_checkpointing()


def each_start(
    teacher: nn.Module, source: Any, moe: Any, scores: Mapping[str, Tensor], config: StudentConfig,
    seed: int, names: Sequence[str] | None = None, size: int = 128,
) -> Iterator[tuple[str, Start, float]]:  # fmt: skip
    """`start_ffn` of every FFN on `config.tokens` tokens of the samples that `measure_importance`
    sees, as many FFNs at once as 4 GiB of host memory hold: (name, start, its output's relative
    error on these tokens).

    Args:
        moe: the `MoEConfig`. scores: a neuron's importance; random ones for initialisation
            "random". names: of the FFNs, None for all.
    """
    formation = "taylor" if config.initialisation == "random" else config.initialisation
    refit = config.outputs == "refitted"
    sizes = (config.importance_batches, seed, config.importance_rows, size)
    linears = ffn_linears(teacher)
    with _compute(teacher):
        inputs = partial(_inputs, teacher, source, *sizes)
        for name, record in each_record(teacher, inputs, config.tokens, seed, names):
            _, down, first = linears[name]
            w2_DF = down.weight[:, first:].detach().float().cpu()
            gen = generator(seed, "weights", 3)
            start = start_ffn(record, scores[name], w2_DF, moe, formation, gen, refit)
            given = outputs(start, record, w2_DF, moe)
            yield name, start, unexplained(given, record.h @ w2_DF.t())


def measure(
    teacher: nn.Module, source: Any, structure: Any, config: StudentConfig, seed: int,
    size: int = 128,
) -> dict[str, Any]:  # fmt: skip
    """What `make_student` needs to know for these settings, and the settings: its keywords."""
    scores = None
    if config.initialisation != "random":
        sizes = (config.importance_batches, seed, config.importance_rows, size)
        scores = measure_importance(teacher, source, *sizes, structure=structure)
    how = {"initialisation": config.initialisation, "routers": config.routers, "importance": scores}
    by_score = config.initialisation in ("taylor", "random") and config.routers == "random"
    if structure.moe is not None and not by_score:
        known = random_scores(teacher, seed) if scores is None else scores
        found = each_start(teacher, source, structure.moe, known, config, seed, size=size)
        how["starts"] = {name: start for name, start, _ in found}
    return how


@torch.no_grad()
def refit_outputs(
    teacher: nn.Module, pruned: nn.Module, source: Any, keep: Mapping[str, Tensor], tokens: int,
    *sizes: Any,
) -> None:  # fmt: skip
    """w2 and b2 of FFNs of which only the neurons `keep` are left, by least squares on `tokens`
    tokens, in place: the start that a mixture has with outputs "refitted".

    sizes: batches, seed, rows and size of `_calibration`.
    """
    dense, left = ffn_linears(teacher), ffn_linears(pruned)
    inputs = partial(_inputs, teacher, source, *sizes)
    with _compute(teacher):
        for name, record in each_record(teacher, inputs, tokens, sizes[1], list(keep)):
            _, down, first = dense[name]
            w2_DF, h_nF = down.weight[:, first:].detach().float().cpu(), record.h.float()
            fitted = least_squares(h_nF[:, keep[name].sort().values], h_nF @ w2_DF.t())
            _, down, first = left[name]
            down.weight[:, first:].copy_(fitted.weight.t())
            down.bias.add_(fitted.bias.to(down.bias))


# --- students -------------------------------------------------------------------------------


def random_scores(teacher: nn.Module, seed: int, structure: Any = None) -> dict[str, Tensor]:
    """A random importance for every neuron: the baseline of Table 5."""
    gen, widths = generator(seed, "weights", 2), {}
    for name, places in ffn_places(teacher, structure).items():
        *_, widths[name] = places[0]
    return {name: torch.rand(width, generator=gen) for name, width in widths.items()}


def neuron_orders(
    teacher: nn.Module, structure: Any, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """FFN name -> its neurons' order: the best-scored are shared, the rest dealt evenly to the
    experts."""
    moe = structure.moe
    if isinstance(structure, AnyMoEConfig):
        shared = {name: layer.shared for name, layer in ffns(teacher, structure).items()}
    else:
        size, _ = moe.sizes(teacher.inner_dim, 4 * teacher.inner_dim)
        shared = dict.fromkeys(scores, size)
    return {
        name: neuron_order_from_importance(score, shared[name], moe.num_experts)
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
    starts: Mapping[str, Start] | None = None,
) -> nn.Module:
    """`convert_flux`, or `convert_any`, with neurons in order and for FLUX.1 a calibrated AdaLN
    basis; MoB groups come later, in stage (c).

    Args:
        importance: eq. (6), not needed for initialisation "random".
        temb: calibration samples of the AdaLN basis, None where AdaLN stays whole.
        initialisation, routers: see `StudentConfig`.
        starts: of `each_start`, for all but initialisation "taylor" and "random" with random
            routers.
    """
    orders = None
    if structure.moe is not None and starts is not None:
        orders = {name: start.order for name, start in starts.items()}
    elif structure.moe is not None:
        random = initialisation == "random"
        scores = random_scores(teacher, seed, structure) if random else importance
        orders = neuron_orders(teacher, structure, scores)
    if isinstance(structure, AnyMoEConfig):
        return convert_any(teacher, structure, orders, generator(seed, "weights").initial_seed())
    student = convert_flux(
        teacher,
        replace(structure, mob=None),
        neuron_order=orders,
        adaln_calibration=temb if structure.adaln_dim is not None else None,
        generator=generator(seed, "weights"),
        copies=initialisation == "copies",
    ).to(next(teacher.parameters()).device)
    if starts is not None:
        for name, layer in moe_layers(student).items():
            apply_start(layer, starts[name], routers == "fitted")
    return student


@torch.no_grad()
def apply_start(layer: nn.Module, start: Start, router: bool) -> None:
    """Router and output weights of a fresh MoE layer, in place."""
    if router:
        layer.router.weight.copy_(start.router)
    if start.w2 is not None:
        _, down = layer.linears()
        down.weight[:, -start.w2.shape[1] :].copy_(start.w2)
        down.bias.add_(start.b2.to(down.bias))


def group_blocks(model: nn.Module, mob: Any, seed: int, source: Any = None) -> nn.Module:
    """A copy of the model with MoB groups and fresh block routers; no other weight changes.

    Args:
        source: of two samples, which show the way of the tokens; not needed for FLUX.1.
    """
    if isinstance(mob, GroupsConfig):
        weight = next(model.parameters())
        inputs = source.batch(seed, 0, 2, "calibrate").to(weight.device).inputs()
        return group_any(model, mob, inputs, generator(seed, "weights", 1).initial_seed())
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
