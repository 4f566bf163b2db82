"""What is left of an FFN when neurons are left out, and output weights that make up for it.

Shapes: n calibration tokens, D width, F neurons, I inputs and O outputs of a regression, C clusters
of tokens.

Everything is fitted on one sample of tokens and is to be judged on another: `unexplained` of the
other's is the relative error that a user will see in the layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-3  # share of the inputs' mean variance that is added to their covariance


class Linear(NamedTuple):
    """y = x @ weight + bias; weight [I, O], bias [O], fp64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x_nI: Tensor) -> Tensor:
        return x_nI.double() @ self.weight + self.bias


def least_squares(
    x_nI: Tensor, y_nO: Tensor, ridge: float = RIDGE, intercept: bool = True
) -> Linear:
    """argmin over (W, b) of |x W + b - y|^2 / n + r |W|^2, r = `ridge` times x's mean variance.

    Solved in fp64 by Cholesky's method on the centred covariance, which is well enough posed with
    the ridge: inputs that are never active get weight 0. Without `intercept` b is 0, and x's mean
    square stands for its variance.
    """
    if x_nI.shape[0] != y_nO.shape[0] or not len(x_nI):
        raise ValueError(
            f"x is {tuple(x_nI.shape)}, y {tuple(y_nO.shape)}; expected as many rows, at least one"
        )
    x, y = x_nI.double(), y_nO.double()
    x_mean, y_mean = x.mean(0) * intercept, y.mean(0) * intercept
    x, y = x - x_mean, y - y_mean
    covariance = x.t() @ x / len(x)
    scale = covariance.diagonal().mean()
    covariance.diagonal().add_(ridge * scale + torch.finfo(torch.float64).tiny)
    if scale == 0:  # nothing varies: the mean alone
        weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, device=x.device)
    else:
        weight = torch.cholesky_solve(x.t() @ y / len(x), torch.linalg.cholesky(covariance))
    return Linear(weight, y_mean - x_mean @ weight)


def unexplained(prediction_nO: Tensor, y_nO: Tensor) -> float:
    """|prediction - y|^2 / |y - mean y|^2: 0 exact, 1 as bad as the mean. 0 if y does not vary and
    is met."""
    y = y_nO.double()
    rest, total = (prediction_nO.double() - y).square().sum(), (y - y.mean(0)).square().sum()
    return float(rest / total) if total > 0 else float(rest > 0)


def contribution(h_nF: Tensor, w2_DF: Tensor) -> Tensor:
    """var(h_i) |w2_i|^2 [F]: what the output's variance loses with neuron i, were the neurons
    uncorrelated. Its mean can be kept in the bias, so it does not count."""
    if len(h_nF) < 2:
        return h_nF.new_zeros(h_nF.shape[1])
    return h_nF.var(0) * w2_DF.square().sum(0)


def token_clusters(
    x_nD: Tensor, count: int, generator: torch.Generator, rounds: int = 20
) -> Tensor:
    """Weights [D, C] of the scores whose largest names a token's cluster: k-means on the
    standardised x, then the regression of one-hots of the clusters on x, without intercept, as
    routers have none."""
    if len(x_nD) < count:
        raise ValueError(f"{len(x_nD)} tokens cannot form {count} clusters; give more")
    z = ((x_nD - x_nD.mean(0)) / x_nD.std(0).clamp(min=1e-6)).float()
    centres = z[torch.randperm(len(z), generator=generator)[:count].to(z.device)].clone()
    for _ in range(rounds):
        own = torch.cdist(z, centres).argmin(1)
        one_hot = torch.nn.functional.one_hot(own, count).float()
        found = one_hot.sum(0)[:, None]
        centres = torch.where(found > 0, one_hot.t() @ z / found.clamp(min=1), centres)
    own = torch.cdist(z, centres).argmin(1)
    one_hot = torch.nn.functional.one_hot(own, count).float()
    target = one_hot - 1 / count  # what is common to all scores changes no choice
    return least_squares(x_nD, target, ridge=1e-2, intercept=False).weight.float()
