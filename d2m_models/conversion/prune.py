"""The comparators: MLP pruning (Diff-Pruning) and depth pruning (BK-SDM).

Both return ordinary models that train, save and load like any other; what makes them comparators is
that they keep only part of the dense model, chosen once, for every token and sample alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from d2m_models.conversion.flux import check_dense_flux, ffn_tensors, ffn_widths, model_arguments
from d2m_models.flux import FluxMoETransformer2DModel


@torch.no_grad()
def prune_mlp(
    dense: FluxTransformer2DModel, keep: Mapping[str, Tensor]
) -> FluxMoETransformer2DModel:
    """Keeps only the named neurons of each FFN, in dense order (Diff-Pruning's structured way).

    Args:
        dense: a dense FLUX, or a `FluxMoETransformer2DModel` without experts (for one with a
            compressed AdaLN, convert with `FluxMoEConfig(moe=None, adaln_dim=...)` first).
        keep: {FFN name: indices of the neurons to keep}, e.g. the best by the Taylor metric of
            eq. 6; FFNs that are not named stay whole.
    """
    check_dense_flux(dense)
    known = ffn_widths(dense)
    unknown = sorted(set(keep) - set(known))
    if unknown:
        raise ValueError(f"keep names FFNs the model does not have: {unknown}")
    state = {key: value.detach().clone() for key, value in dense.state_dict().items()}
    arguments = model_arguments(dense)
    widths = dict(arguments.get("ff_dims") or {})
    for name, neurons in keep.items():
        index = _check_neurons(neurons, known[name], name)
        widths[name] = index.numel()
        for key, dim, _ in ffn_tensors(name):
            first = state[key].shape[dim] - known[name]
            columns = torch.cat([torch.arange(first), first + index]).to(state[key].device)
            state[key] = state[key].index_select(dim, columns)
    arguments["ff_dims"] = widths
    with torch.device("meta"):
        model = FluxMoETransformer2DModel(**arguments)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _check_neurons(neurons: Tensor, hidden: int, name: str) -> Tensor:
    if not isinstance(neurons, Tensor) or neurons.ndim != 1 or neurons.dtype.is_floating_point:
        raise ValueError(f"keep[{name!r}] must be a 1-D integer tensor, got {neurons!r}")
    index = neurons.detach().to("cpu", torch.int64).sort().values
    if (
        index.numel() == 0
        or index[0] < 0
        or index[-1] >= hidden
        or index.unique().numel() != len(index)
    ):
        raise ValueError(
            f"keep[{name!r}] must hold different neurons in 0..{hidden - 1}, at least one"
        )
    return index


@torch.no_grad()
def prune_depth(
    model: FluxTransformer2DModel, double: Iterable[int], single: Iterable[int]
) -> FluxTransformer2DModel:
    """Keeps only the given blocks, in their old order (BK-SDM).

    Args:
        model: a dense FLUX, or a converted one without MoB groups; the result is of its class.
        double, single: indices of the blocks to keep.
    """
    if not isinstance(model, FluxTransformer2DModel):
        raise TypeError(f"model must be a FLUX model, got {type(model).__name__}")
    if model.config.get("mob"):
        raise ValueError(
            "model has MoB groups, whose blocks cannot be removed; prune it without mob"
        )
    kept = {
        "transformer_blocks": _check_blocks(double, len(model.transformer_blocks), "double"),
        "single_transformer_blocks": _check_blocks(
            single, len(model.single_transformer_blocks), "single"
        ),
    }
    new_place = {
        f"{k}.{old}": f"{k}.{new}" for k, olds in kept.items() for new, old in enumerate(olds)
    }
    arguments = {k: v for k, v in model.config.items() if not k.startswith("_")}
    arguments["num_layers"] = len(kept["transformer_blocks"])
    arguments["num_single_layers"] = len(kept["single_transformer_blocks"])
    for name, olds in (
        ("dense_double_blocks", kept["transformer_blocks"]),
        ("dense_single_blocks", kept["single_transformer_blocks"]),
    ):
        if name in arguments:
            arguments[name] = [new for new, old in enumerate(olds) if old in arguments[name]]
    if arguments.get("ff_dims"):
        moved = {_move(name, new_place): width for name, width in arguments["ff_dims"].items()}
        arguments["ff_dims"] = {name: width for name, width in moved.items() if name}
    state = {}
    for key, value in model.state_dict().items():
        moved_key = _move(key, new_place)
        if moved_key:
            state[moved_key] = value.detach().clone()
    with torch.device("meta"):
        pruned = type(model)(**arguments)
    pruned.load_state_dict(state, strict=True, assign=True)
    return pruned.eval()


def _move(name: str, new_place: Mapping[str, str]) -> str | None:
    """A tensor's or FFN's name in the pruned model; None if its block is gone."""
    if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return name
    kind, index, *rest = name.split(".")
    block = new_place.get(f"{kind}.{index}")
    return None if block is None else ".".join([block, *rest])


def _check_blocks(blocks: Iterable[int], count: int, name: str) -> list[int]:
    blocks = list(blocks)
    if any(isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < count for b in blocks):
        raise ValueError(f"{name} must hold block indices in 0..{count - 1}, got {blocks}")
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"{name} names a block twice: {blocks}")
    return sorted(blocks)
