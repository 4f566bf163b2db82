"""Experts and routers from calibration data: options beside the paper's way.

Shapes: n calibration tokens, D width, F neurons, S shared ones, E experts, H neurons of an expert.

The paper deals neurons to experts by importance alone and starts routers at random. Here neurons
that fire together share an expert, and a router starts as the ridge regression of each expert's
(log) contribution on its input:

    s_ne = || sum_{i in expert e} h_ni w2_i ||,    W_g = argmin || x W_g^T - log s + mean_e log s ||

so that the experts chosen are those that matter for the token, before any training.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2m_models.config import MoEConfig
from d2m_models.conversion.flux import ffn_linears
from d2m_models.conversion.least_squares import contribution, least_squares, token_clusters
from d2m_models.partition import (
    cluster_neuron_order,
    coactivation_neuron_order,
    inverse_order,
)
from d2m_models.topk import moe_layers
from d2m_models.weights import effective_weight


class FFNRecord(NamedTuple):
    """Inputs [n, D] and activations [n, F] of one dense FFN, fp32 on the CPU."""

    x: Tensor
    h: Tensor


@torch.no_grad()
def record_ffns(
    dense: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    tokens: int = 2048,
    seed: int = 0,
    names: Collection[str] | None = None,
) -> dict[str, FFNRecord]:
    """Runs a dense FLUX and keeps a random `tokens` of every FFN's inputs and activations.

    Args:
        batches: keyword arguments of the model's forward: noised images and prompts of training.
        names: of the FFNs to record, None for all; which tokens are kept of one does not depend on
            what else is recorded.
    """
    samples, handles = {}, []
    for name, (up, down, _) in ffn_linears(dense).items():
        if names is not None and name not in names:
            continue
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        samples[name] = sample = _Sample(tokens, up.out_features, generator)
        handles.append(up.register_forward_pre_hook(sample.see_input))
        handles.append(down.register_forward_pre_hook(sample.see_activation))
    try:
        for batch in batches:
            dense(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if any(sample.h is None for sample in samples.values()):
        raise ValueError("batches is empty; pass at least one batch of calibration inputs")
    return {name: FFNRecord(sample.x, sample.h) for name, sample in samples.items()}


def each_record(
    dense: nn.Module,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    tokens: int,
    seed: int = 0,
    names: Sequence[str] | None = None,
    memory_gib: float = 4.0,
) -> Iterator[tuple[str, FFNRecord]]:
    """The records of `record_ffns` one by one, no more at once than `memory_gib` holds: the model
    runs again for those that are left. FLUX.1's at 147k tokens would take 680 GB.

    Args:
        batches: gives the same batches whenever it is called.
    """
    linears = ffn_linears(dense)
    names = list(linears if names is None else names)
    most = max((sum(linears[n][0].weight.shape) for n in names), default=1)
    at_once = max(1, int(memory_gib * 2**30 / (4 * tokens * most)))
    for start in range(0, len(names), at_once):
        part = names[start : start + at_once]
        records = record_ffns(dense, batches(), tokens, seed, part)
        for name in part:
            yield name, records.pop(name)


class _Sample:
    """A uniform sample of one FFN's tokens: those of the largest random keys, whatever comes.

    Only these are copied and kept: one image of FLUX.1 has 13 GB of activations.
    """

    def __init__(self, tokens: int, width: int, generator: torch.Generator):
        self.tokens, self.width, self.generator = tokens, width, generator
        self.keys = torch.empty(0, dtype=torch.float64)
        self.x: Tensor | None = None
        self.h: Tensor | None = None

    def see_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_nD = args[0].reshape(-1, args[0].shape[-1])
        fresh = torch.rand(len(x_nD), generator=self.generator, dtype=torch.float64)
        keys, old = torch.cat([self.keys, fresh]), len(self.keys)
        best = keys.topk(min(self.tokens, len(keys))).indices
        self.stay, self.new = best[best < old], best[best >= old] - old
        self.keys = torch.cat([self.keys[self.stay], fresh[self.new]])  # in _merge's order
        self.x = self._merge(self.x, x_nD)

    def see_activation(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        h_nF = args[0].reshape(-1, args[0].shape[-1])
        # of proj_out's input the last columns are the MLP's
        self.h = self._merge(self.h, h_nF[:, -self.width :])

    def _merge(self, kept: Tensor | None, values: Tensor) -> Tensor:
        new = values[self.new.to(values.device)].float().cpu()
        return new if kept is None else torch.cat([kept[self.stay], new])


def coactivation_orders(
    records: Mapping[str, FFNRecord], importance: Mapping[str, Tensor], config: MoEConfig
) -> dict[str, Tensor]:
    """`neuron_order` for `convert_flux`: shared by importance, experts by co-activation."""
    orders = {}
    for name, record in records.items():
        shared, _ = config.sizes(record.x.shape[1], record.h.shape[1])
        orders[name] = coactivation_neuron_order(
            importance[name], record.h, shared, config.num_experts
        )
    return orders


@torch.no_grad()
def form_clusters(
    record: FFNRecord, score_F: Tensor, w2_DF: Tensor, config: MoEConfig,
    generator: torch.Generator, copies: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Experts for clusters of tokens: (neuron order [F], router [E, D]) of one FFN.

    Tokens form E / k clusters, k = top_k (E of them if k does not divide E), and k experts with one
    router row serve each. Shared neurons go by `score_F`; of the others each goes to the cluster in
    whose tokens most of its `contribution` lies; or each cluster has copies of those that
    contribute most to its tokens.
    """
    x_nD, h_nF = record
    shared, _ = config.sizes(x_nD.shape[1], h_nF.shape[1])
    experts, top_k = config.num_experts, config.top_k
    each = top_k if isinstance(top_k, int) and top_k and experts % top_k == 0 else 1
    router_DC = token_clusters(x_nD, experts // each, generator)
    own_n = (x_nD @ router_DC).argmax(1)
    score_CF = torch.stack([
        contribution(h_nF[own_n == c], w2_DF) * (own_n == c).float().mean()
        for c in range(experts // each)
    ])  # fmt: skip
    order_F = cluster_neuron_order(score_F, score_CF, shared, experts, copies)
    return order_F, router_DC.t().repeat_interleave(each, dim=0)


def contribution_router(
    record: FFNRecord,
    w2_DF: Tensor,
    order_F: Tensor,
    shared: int,
    experts: int,
    ridge: float = 1e-2,
) -> tuple[Tensor, float]:
    """The router [E, D] of this module's equation for one FFN whose neurons are to lie in
    `order_F`, and the share of its targets' variance that it explains."""
    columns = [
        (record.h[:, own] @ w2_DF[:, own].t()).norm(dim=1)
        for own in order_F[shared:].view(experts, -1)
    ]
    target_nE = torch.stack(columns, dim=1).clamp(min=1e-12).log().double()
    target_nE -= target_nE.mean(1, keepdim=True)  # softmax does not see it
    weight_DE, _ = least_squares(record.x, target_nE, ridge, intercept=False)
    rest = (target_nE - record.x.double() @ weight_DE).square().sum()
    return weight_DE.t().float(), float(1 - rest / target_nE.square().sum())


@torch.no_grad()
def fit_routers(
    model: nn.Module, records: Mapping[str, FFNRecord], ridge: float = 1e-2
) -> dict[str, float]:
    """Sets every router of a fresh conversion by regression, in place.

    Args:
        model: from `convert_flux`, its expert weights still the dense model's.
        records: of the dense model, `record_ffns`.
        ridge: share of the mean variance of x that is added to its covariance.

    Returns:
        layer -> share of the targets' variance that the router explains.
    """
    explained = {}
    for name, layer in moe_layers(model).items():
        if name not in records:
            raise ValueError(f"records lacks {name!r}; record the dense model of this conversion")
        x_nD, h_nF = records[name]
        _, down = layer.linears()
        w2_DX, _ = effective_weight(down)
        w2_DF = w2_DX[:, -h_nF.shape[1] :].float().cpu()
        order_F = layer.neuron_order.long().cpu()
        # the model's w2 lies in the layer's order already
        w2_DF = w2_DF[:, inverse_order(order_F)]
        router_ED, explained[name] = contribution_router(
            FFNRecord(x_nD, h_nF), w2_DF, order_F, layer.shared, layer.num_experts, ridge
        )
        layer.router.weight.copy_(router_ED)
    return explained
