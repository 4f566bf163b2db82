"""What the ops hand on: the routing, and the layer's tensors and settings as a back-end gets them.

Shapes: T tokens, D model, F hidden = S shared + E * H, E experts, K top-k, N = T*K slots; slot
s = t*K + j is the j-th choice of token t.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch


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


torch.export.register_dataclass(Routing, serialized_type_name="d2m_kernels.Routing")


class FFNInputs(NamedTuple):
    """One stream of tokens: all that the layer computes with.

    Until the op cuts them, `up` and `b_up` may hold both halves of a gated FFN, stacked.
    """

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


class FFNGrads(NamedTuple):
    """Where `ffn_bwd` writes: every buffer that is not None is to be filled completely.

    The first fields of `FFNInputs`, under their names and with their shapes.
    """

    x: torch.Tensor | None
    up: torch.Tensor | None
    gate: torch.Tensor | None
    w2: torch.Tensor | None
    b_up: torch.Tensor | None
    b_gate: torch.Tensor | None
    b2: torch.Tensor | None
    weights: torch.Tensor | None


class FFNAttrs(NamedTuple):
    """The layer's settings, alike for all streams of a call."""

    shared: int  # S, the first neurons, which every token uses
    activation: str
    gate_first: bool = False  # how halves are stacked; of no concern to a back-end
    scale: float = 1.0  # factor of the routed sum
    frozen: int = 0  # the first neurons, whose gradient is zero
    save: bool = False  # whether the forward is to return the pre-activations
