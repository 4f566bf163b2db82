"""Routing: everything the stages after `route` need to know, in one frozen dataclass.

Shapes: T tokens, E experts, K top-k, N = T*K slots; slot s = t*K + j is the j-th choice of token t.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch.utils import _pytree


@dataclass(frozen=True)
class Routing:
    """Where every token goes (eqs. 2-3) and how the slots lie in expert order.

    Attributes:
        probs: [T, E] fp32, softmax over all experts; with gradient (balance losses).
        weights: [T, K] fp32, softmax over the selected logits; carries gradient.
        ids: [T, K] int32, the selected experts, best first; -1 for a masked token.
        offsets: [E + 1] int32, expert e owns rows offsets[e]:offsets[e + 1] of the expert order;
            offsets[E] counts the routed slots (N, less the masked ones).
        order: [N] int32, row -> slot; stable within an expert, masked slots last.
        inverse: [N] int32, slot -> row, so that order[inverse[s]] == s.

    With `top_k` 0 or "dense" K is 0: ids, weights, order and inverse are empty, offsets zero.
    """

    probs: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    def detach(self) -> Routing:
        """The same routing without gradient, e.g. to keep for statistics."""
        return Routing(*(getattr(self, f.name).detach() for f in fields(self)))


_NAMES = tuple(f.name for f in fields(Routing))

_pytree.register_pytree_node(
    Routing,
    lambda r: ([getattr(r, name) for name in _NAMES], None),
    lambda leaves, _context: Routing(*leaves),
    serialized_type_name="d2m_kernels.Routing",
    flatten_with_keys_fn=lambda r: (
        [(_pytree.GetAttrKey(name), getattr(r, name)) for name in _NAMES],
        None,
    ),
)


class FFNInputs(NamedTuple):
    """One stream's tensors of `ffn_fwd`, in its order."""

    x: torch.Tensor  # [T, D]
    up: torch.Tensor  # [F, D]
    gate: torch.Tensor | None  # [F, D]
    w2: torch.Tensor  # [D, F]
    b_up: torch.Tensor | None  # [F]
    b_gate: torch.Tensor | None  # [F]
    b2: torch.Tensor | None  # [D]
    weights: torch.Tensor  # [T, K] fp32
    offsets: torch.Tensor  # [E + 1] int32
    order: torch.Tensor  # [N] int32
    inverse: torch.Tensor  # [N] int32


@dataclass
class FFNGrads:
    """Where `ffn_bwd` writes: every buffer that is not None is to be filled completely."""

    x: torch.Tensor | None  # [T, D]
    up: torch.Tensor | None  # [F, D]
    gate: torch.Tensor | None  # [F, D]
    w2: torch.Tensor | None  # [D, F]
    b_up: torch.Tensor | None  # [F]
    b_gate: torch.Tensor | None  # [F]
    b2: torch.Tensor | None  # [D]
    weights: torch.Tensor | None  # [T, K] fp32
