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


def ffn_fwd(streams, attrs, ends):
    results = []
    for s in streams:
        y = torch.empty_like(s.x)
        if attrs.save:
            expert = (s.w2.shape[1] - attrs.shared) // (s.offsets.shape[0] - 1)
            z_shared = s.x.new_empty(s.x.shape[0], attrs.shared)
            results.append((y, z_shared, s.x.new_empty(s.order.shape[0], expert)))
        else:
            results.append((y, None, None))
    return results


def ffn_bwd(dys, streams, zs, attrs, grads):
    return None
