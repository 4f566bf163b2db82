"""The MoE layer: a dense FFN whose neurons lie in another order, plus a router.

Shapes: T tokens, D width, F = F_s + E * F_e neurons, E experts, K top-k.

    w1 [F, D] rows, w2 [D, F] columns: [ shared | expert 0 | ... | expert E-1 ]

The Linears stay the dense model's own, under the dense model's names; an expert is a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_kernels import Routing, Stream, moe_ffn, moe_ffn_pair, route
from d2m_models.config import MoEConfig
from d2m_models.private import is_bare
from d2m_models.weights import effective_weight, stays_in_place

SETTINGS = (
    "shared", "expert", "num_experts", "top_k", "routed_scale", "activation", "gate_first",
    "freeze_shared", "backend", "router", "neuron_order",
)  # fmt: skip
ROUTER_STD = 0.02  # never zero: ties would send every token to experts 0..K-1


class ExpertLayer(nn.Module):
    """What every routed layer has: router, sizes, the order of its neurons, and how to run.

    Attributes:
        router: Linear [E, D] without bias, W_g of eq. 3; kept in fp32.
        neuron_order: int32 [F] buffer, new position -> neuron of the dense FFN.
        shared: F_s. num_experts: E. expert: F_e.
        top_k: experts per token, 0..E, or "dense"; change it with `set_top_k`.
        freeze_shared: no gradient for the shared neurons (second distillation stage).
        backend: None for the best `d2m_kernels` back-end, or its name.
    """

    num_experts = 0  # until add_experts: a FLUX block that stays dense has none

    def add_experts(
        self, dim: int, hidden: int, config: MoEConfig, activation: str, gate_first: bool = False
    ) -> None:
        """Adds router, neuron order and settings for an FFN of `hidden` neurons.

        A part of the dense module that has a setting's name (Kandinsky's `activation`) goes.
        """
        for name in SETTINGS:
            self._modules.pop(name, None)
        self.shared, self.expert = config.sizes(dim, hidden)
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.routed_scale = config.routed_scale
        self.activation = activation
        self.gate_first = gate_first
        self.freeze_shared = False
        self.backend: str | None = None
        self.router = nn.Linear(dim, config.num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
        self.register_buffer("neuron_order", torch.arange(hidden, dtype=torch.int32))

    def linears(self) -> tuple[nn.Module, nn.Module]:
        """The up and the down Linear, as they are now: peft puts wrappers in their place."""
        raise NotImplementedError

    def gate_linear(self) -> nn.Module | None:
        """The gate's Linear, where a gated FFN has one of its own."""
        return None

    def run_experts(
        self,
        x: Tensor,
        up: nn.Module,
        down: nn.Module,
        first_column: int = 0,
        routing: Routing | None = None,
        token_mask: Tensor | None = None,
        also: Any = None,
        first_row: int = 0,
    ) -> tuple[Tensor, Routing]:
        """shared(x) + routed_scale * sum_k weight * expert(x) + b2 (eqs. 2-3).

        Args:
            x: [..., D]. up: Linear whose weight holds w1 [F, D] in the rows from `first_row` on.
                down: Linear whose weight holds w2 [D, F] in the columns from `first_column` on.
            routing: ids of an earlier call; weights are computed afresh.
            token_mask: [...] bool; False tokens get the shared neurons only.
            also: called with up's weight and bias and down's weight, its result is added: the rest
                of fused Linears.
        """

        def run(router_ED, w1_XD, b1_X, w2_DX, b2_D, gate_FD=None, b_gate_F=None):
            w1_FD, b1_F = w1_XD, b1_X
            if first_row:
                w1_FD, b1_F = w1_XD[first_row:], None if b1_X is None else b1_X[first_row:]
            if gate_FD is not None:
                w1_FD, b1_F = (w1_FD, gate_FD), None if b1_F is None else (b1_F, b_gate_F)
            y, new_routing = moe_ffn(
                x,
                router_ED,
                w1_FD,
                w2_DX[:, first_column:] if first_column else w2_DX,
                b1_F,
                b2_D,
                **self.settings(),
                token_mask=token_mask,
                routing=routing,
                backend=self.backend,
                return_routing=True,
            )
            return (y if also is None else y + also(w1_XD, b1_X, w2_DX)), new_routing

        return self.with_weights(up, down, run)

    def run_beside(
        self,
        x: Tensor,
        beside: Tensor,
        routing: Routing | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """down(cat([beside, ffn(x)])), where beside [..., C] has down's first C columns."""
        width = beside.shape[-1]
        return self.run_experts(
            x,
            *self.linears(),
            first_column=width,
            routing=routing,
            token_mask=token_mask,
            also=(lambda _w1, _b1, w2: F.linear(beside, w2[:, :width])) if width else None,
        )

    def settings(self) -> dict[str, Any]:
        """How `moe_ffn` is to run this layer."""
        return dict(
            top_k=self.top_k,
            shared=self.shared,
            activation=self.activation,
            gate_first=self.gate_first,
            routed_scale=self.routed_scale,
            freeze_shared=self.freeze_shared,
        )

    def with_weights(self, up: nn.Module, down: nn.Module, use: Callable) -> Any:
        """use(router, w1, b1, w2, b2, and a gate's own weight and bias if there is one).

        Nested, so that all weights are in place (onloaded, cast) while they are used.
        """

        def with_up_and_down(router_ED, *gate):
            return effective_weight(
                up,
                lambda w1_XD, b1_X: effective_weight(
                    down, lambda w2_DX, b2_D: use(router_ED, w1_XD, b1_X, w2_DX, b2_D, *gate)
                ),
            )

        gate = self.gate_linear()
        if gate is None:
            return effective_weight(self.router, lambda router_ED, _: with_up_and_down(router_ED))
        return effective_weight(
            self.router,
            lambda router_ED, _: effective_weight(
                gate, lambda gate_FD, b_gate_F: with_up_and_down(router_ED, gate_FD, b_gate_F)
            ),
        )

    def choose(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
        """Only the routing of x, without gradient: ids to keep for a recomputation."""
        with torch.no_grad():
            return effective_weight(
                self.router,
                lambda router_ED, _: route(
                    x, router_ED, top_k=self.top_k, token_mask=token_mask, backend=self.backend
                ),
            )

    def extra_repr(self) -> str:
        return f"shared={self.shared}, experts={self.num_experts}x{self.expert}, top_k={self.top_k}"


class MoEFeedForward(ExpertLayer):
    """An FFN module turned into an MoE layer in place of itself, children and names unchanged.

    Args:
        ffn: the dense module; its children are adopted (their neurons already in order).
        up, down: paths of its two Linears, e.g. "net.0.proj" and "net.2".
        activation: name as in `moe_ffn`.
        config: the experts.
        gate_first: for gated activations, w1 is [gate; up] rather than [up; gate].
        gate: path of the gate's own Linear, if it has one.
    """

    def __init__(
        self,
        ffn: nn.Module,
        config: MoEConfig,
        activation: str = "gelu_tanh",
        up: str = "net.0.proj",
        down: str = "net.2",
        gate_first: bool = False,
        gate: str | None = None,
    ):
        super().__init__()
        for name, child in ffn.named_children():
            self.add_module(name, child)
        self._paths = (up, down)
        self._gate_path = gate
        dim, hidden = ffn.get_submodule(up).in_features, ffn.get_submodule(down).in_features
        self.add_experts(dim, hidden, config, activation, gate_first)

    def linears(self) -> tuple[nn.Module, nn.Module]:
        up, down = self._paths
        return self.get_submodule(up), self.get_submodule(down)

    def gate_linear(self) -> nn.Module | None:
        return None if self._gate_path is None else self.get_submodule(self._gate_path)

    def forward(
        self,
        x: Tensor,
        routing: Routing | None = None,
        token_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        y, routing = self.run_experts(x, *self.linears(), routing=routing, token_mask=token_mask)
        return (y, routing) if return_routing else y


def can_run_together(*layers: nn.Module) -> bool:
    """Whether `run_together` does for these layers just what calling each of them would do.

    Not so where something hangs on a layer's call (hooks, compilation, a replaced forward), and not
    worth it where weights are brought in for their use only: two layers' would be there at once.
    """
    return all(
        type(layer) is MoEFeedForward
        and layer.backend == layers[0].backend
        and is_bare(layer)
        and all(stays_in_place(linear) for linear in (*layer.linears(), layer.router))
        and layer.gate_linear() is None
        for layer in layers
    )


def run_together(
    first: MoEFeedForward,
    second: MoEFeedForward,
    xs: tuple[Tensor, Tensor],
    routings: tuple[Routing | None, Routing | None] = (None, None),
    token_masks: tuple[Tensor | None, Tensor | None] = (None, None),
    blocks: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
) -> tuple[tuple[Tensor, Routing], tuple[Tensor, Routing]]:
    """Both layers' (output, Routing) by `moe_ffn_pair`: one launch a stage for image and text.

    `blocks`: modulation, norm_eps, gate and residual of each, where the block's AdaLN goes along.
    """

    def stream(i, layer, router_ED, w1_FD, b1_F, w2_DF, b2_D):
        return Stream(
            xs[i],
            router_ED,
            w1_FD,
            w2_DF,
            b1_F,
            b2_D,
            **layer.settings(),
            token_mask=token_masks[i],
            routing=routings[i],
            **blocks[i],
        )

    return first.with_weights(
        *first.linears(),
        lambda *a: second.with_weights(
            *second.linears(),
            lambda *b: moe_ffn_pair(
                stream(0, first, *a),
                stream(1, second, *b),
                backend=first.backend,
                return_routing=True,
            ),
        ),
    )
