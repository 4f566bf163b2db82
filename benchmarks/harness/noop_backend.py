"""A back-end whose kernels do nothing: what is left of a call is Python and dispatch."""

from __future__ import annotations

import torch

NAME = "noop"


def unavailable():
    return None


def unsupported(device_type, dtype):
    return None


def route(x_TD, router_ED, top_k, mask_T=None):
    (T, _), E = x_TD.shape, router_ED.shape[0]
    probs = x_TD.new_empty(T, E, dtype=torch.float32)
    weights = x_TD.new_empty(T, top_k, dtype=torch.float32)
    ids = x_TD.new_zeros(T, top_k, dtype=torch.int32)  # the gradient gathers by them
    offsets = x_TD.new_empty(E + 1, dtype=torch.int32)
    order, inverse = (x_TD.new_empty(T * top_k, dtype=torch.int32) for _ in range(2))
    return probs, weights, ids, offsets, order, inverse


def ffn_fwd(x_TD, up_FD, gate_FD, w2_DF, b_up, b_gate, b2, weights, offsets, order_N, inverse_N,
            shared, activation, scale, save):  # fmt: skip
    y = torch.empty_like(x_TD)
    if not save:
        return y, None, None
    expert = (w2_DF.shape[1] - shared) // (offsets.shape[0] - 1)
    return y, x_TD.new_empty(x_TD.shape[0], shared), x_TD.new_empty(order_N.shape[0], expert)


def ffn_bwd(*args):
    return None
