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
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2m_models.config import MoEConfig
from d2m_models.conversion.flux import ffn_linears
from d2m_models.partition import coactivation_neuron_order
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
        h_nF = h_nF[:, layer.neuron_order.long().cpu()]
        columns = []
        for e in range(layer.num_experts):
            own = slice(layer.shared + e * layer.expert, layer.shared + (e + 1) * layer.expert)
            columns.append((h_nF[:, own] @ w2_DF[:, own].t()).norm(dim=1))
        target_nE = torch.stack(columns, dim=1).clamp(min=1e-12).log().double()
        target_nE -= target_nE.mean(1, keepdim=True)  # softmax does not see it
        x = x_nD.double()
        covariance = x.t() @ x / len(x)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        w_DE = torch.linalg.solve(covariance, x.t() @ target_nE / len(x))
        rest = (target_nE - x @ w_DE).square().sum()
        explained[name] = float(1 - rest / target_nE.square().sum())
        layer.router.weight.copy_(w_DE.t())
    return explained
