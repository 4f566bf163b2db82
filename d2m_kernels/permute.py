"""`permute`: the stable counting sort that puts the slots in expert order.

Shapes: T tokens, E experts, K top-k, N = T*K slots.
"""

from __future__ import annotations

import torch

from d2m_kernels import backends, checks
from d2m_kernels.op import define

_PERMUTE = (
    "(Tensor ids, int num_experts, str backend) -> (Tensor offsets, Tensor order, Tensor inverse)"
)


def permute(ids, num_experts: int, *, backend=None):
    """Sorts the slots t*K + j by ids[t, j], keeping their order within an expert.

    Args:
        ids: [T, K] int32 in -1..E-1; slots with -1 (masked tokens) go last and are not counted.
            Values outside this range are undefined behaviour: checking them would need a host sync.
        num_experts: E.

    Returns:
        offsets [E + 1], order [N] (row -> slot), inverse [N] (slot -> row), all int32.

    Raises:
        TypeError, ValueError: ids is not a [T, K] int32 tensor, or num_experts < 1.
    """
    checks.tensor("ids", ids, 2, "[T, K] int32")
    if ids.dtype != torch.int32:
        raise TypeError(f"ids: expected int32, got {checks.shape_of(ids)}")
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts: expected an int >= 1, got {num_experts!r}")
    name = backends.resolve(backend, ids.device.type, torch.float32)
    return torch.ops.d2m.permute.default(ids.contiguous(), num_experts, name)


@define("permute", _PERMUTE)
def _permute(ids, num_experts, backend):
    return backends.module(backend).permute(ids, num_experts)


@torch.library.register_fake("d2m::permute")
def _(ids, num_experts, backend):
    slots = ids.new_empty(ids.numel(), dtype=torch.int32)
    return ids.new_empty(num_experts + 1, dtype=torch.int32), slots, torch.empty_like(slots)
