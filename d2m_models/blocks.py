"""FLUX's two kinds of block with MoE feed-forwards and, if wanted, a narrow AdaLN input.

Shapes: B samples, I image tokens, X text tokens, S = X + I, D width, F neurons, A AdaLN input.

A block is called like diffusers' own and returns (text, image); three more arguments exist:

    token_mask      [B, X] bool, False for padding: those text tokens are not routed
    saved_routing   dict, filled by the first pass and read by a recomputation, so that gradient
                    checkpointing never routes twice (ids that flip would corrupt the gradient);
                    not used by compiled blocks, whose two passes are to be one program
    return_routing  also return {"ff": Routing, "ff_context": Routing} or {"": Routing}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_kernels import Routing, backends
from d2m_kernels.tensors import autocast_dtype
from d2m_models.config import MoEConfig
from d2m_models.moe import ExpertLayer, MoEFeedForward, can_run_together, run_together
from d2m_models.private import is_bare


def narrow_adaln(norm: nn.Module, width: int) -> None:
    """Lets an AdaLN module read the compressed conditioning, to which silu is already applied."""
    norm.silu = nn.Identity()
    norm.linear = nn.Linear(width, norm.linear.out_features)


def fuses_adaln(backend: str | None, x: Tensor) -> bool:
    """Whether the back-end for x takes a block's AdaLN along; for the others it is no gain."""
    return backends.groups_streams(backends.resolve(backend, x.device.type, x.dtype))


def _reuse(layer: ExpertLayer, key: str, saved: dict[str, Routing] | None, x, mask):
    """The ids for this pass: None (route now), or those that the first pass saved."""
    if saved is None or torch.compiler.is_compiling() or layer.top_k in (0, "dense"):
        return None
    if key not in saved:
        saved[key] = layer.choose(x, mask)
    return saved[key]


class FluxMoETransformerBlock(FluxTransformerBlock):
    """Double-stream block; `ff` and `ff_context` are MoE layers unless `moe` is None.

    Args:
        dim, num_attention_heads, attention_head_dim: as FLUX.
        moe: the experts, or None.
        adaln_dim: A, or None for D.
        ff_dim, ff_context_dim: F where it is not 4 D (pruned models).
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        moe: MoEConfig | None = None,
        adaln_dim: int | None = None,
        ff_dim: int | None = None,
        ff_context_dim: int | None = None,
    ):
        super().__init__(dim, num_attention_heads, attention_head_dim)
        if adaln_dim is not None:
            narrow_adaln(self.norm1, adaln_dim)
            narrow_adaln(self.norm1_context, adaln_dim)
        for name, hidden in (("ff", ff_dim), ("ff_context", ff_context_dim)):
            if hidden is not None:
                ffn = FeedForward(dim, dim, inner_dim=hidden, activation_fn="gelu-approximate")
                setattr(self, name, ffn)
            if moe is not None:
                setattr(self, name, MoEFeedForward(getattr(self, name), moe))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        token_mask: Tensor | None = None,
        saved_routing: dict[str, Routing] | None = None,
        return_routing: bool = False,
    ):
        x, c = hidden_states, encoder_hidden_states
        x_normed, x_gate_attn, x_shift, x_scale, x_gate = self.norm1(x, emb=temb)
        c_normed, c_gate_attn, c_shift, c_scale, c_gate = self.norm1_context(c, emb=temb)
        # (image, text), and a third part when an IP-Adapter is loaded
        x_attn, c_attn, *ip_attn = self.attn(
            hidden_states=x_normed,
            encoder_hidden_states=c_normed,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        routing: dict[str, Routing] = {}

        x = x + x_gate_attn.unsqueeze(1) * x_attn
        c = c + c_gate_attn.unsqueeze(1) * c_attn
        if saved_routing is None and self._adaln_goes_along(x):
            # The same arithmetic, rounded less often, in the launches of the FFN itself.
            along = (
                dict(modulation=(x_scale, x_shift), gate=x_gate, norm_eps=self.norm2.eps),
                dict(modulation=(c_scale, c_shift), gate=c_gate, norm_eps=self.norm2_context.eps),
            )
            x, c = self._run_together(x, c, token_mask, None, routing, along)
        else:
            x_normed = self.norm2(x) * (1 + x_scale[:, None]) + x_shift[:, None]
            c_normed = self.norm2_context(c) * (1 + c_scale[:, None]) + c_shift[:, None]
            x_ff, c_ff = self._feed_forwards(x_normed, c_normed, token_mask, saved_routing, routing)
            x = x + x_gate.unsqueeze(1) * x_ff
            c = c + c_gate.unsqueeze(1) * c_ff
        if ip_attn:
            x = x + ip_attn[0]
        if c.dtype == torch.float16:
            c = c.clip(-65504, 65504)
        return (c, x, routing) if return_routing else (c, x)

    def _feed_forwards(self, x, c, mask, saved, routing):
        """Image and text FFN, together where they are MoE layers with nothing hanging on them."""
        if not can_run_together(self.ff, self.ff_context):
            x_ff = self._feed_forward("ff", x, None, saved, routing)
            return x_ff, self._feed_forward("ff_context", c, mask, saved, routing)
        return self._run_together(x, c, mask, saved, routing)

    def _run_together(self, x, c, mask, saved, routing, along=({}, {})):
        reuse = (
            _reuse(self.ff, "ff", saved, x, None),
            _reuse(self.ff_context, "ff_context", saved, c, mask),
        )
        if along[0]:
            along = tuple({**a, "residual": r} for a, r in zip(along, (x, c), strict=True))
        results = run_together(self.ff, self.ff_context, (x, c), reuse, (None, mask), along)
        (x_ff, routing["ff"]), (c_ff, routing["ff_context"]) = results
        return x_ff, c_ff

    def _adaln_goes_along(self, x) -> bool:
        """Whether LayerNorm, modulation, gate and residual can ride in the FFNs' launches."""
        norms = (self.norm2, self.norm2_context)
        return (
            not torch.is_grad_enabled()
            and autocast_dtype(x.device.type) is None
            and can_run_together(self.ff, self.ff_context)
            and all(type(n) is nn.LayerNorm and n.weight is None and is_bare(n) for n in norms)
            and fuses_adaln(self.ff.backend, x)
        )

    def _feed_forward(self, name, x, mask, saved, routing):
        layer = getattr(self, name)
        if not isinstance(layer, MoEFeedForward):
            return layer(x)
        reuse = _reuse(layer, name, saved, x, mask)
        y, routing[name] = layer(x, routing=reuse, token_mask=mask, return_routing=True)
        return y


class FluxMoESingleTransformerBlock(FluxSingleTransformerBlock, ExpertLayer):
    """Single-stream block; `proj_mlp` and the MLP columns of `proj_out` are the MoE layer.

    `proj_out` [D, D + F] acts on [attention | mlp]; its columns are [attention | shared | experts],
    so the MoE part is a view of the dense model's own matrix.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        moe: MoEConfig | None = None,
        adaln_dim: int | None = None,
        mlp_dim: int | None = None,
    ):
        super().__init__(dim, num_attention_heads, attention_head_dim)
        if adaln_dim is not None:
            narrow_adaln(self.norm, adaln_dim)
        if mlp_dim is not None:
            self.mlp_hidden_dim = mlp_dim
            self.proj_mlp = nn.Linear(dim, mlp_dim)
            self.proj_out = nn.Linear(dim + mlp_dim, dim)
        if moe is not None:
            self.add_experts(dim, self.mlp_hidden_dim, moe, "gelu_tanh")

    def linears(self) -> tuple[nn.Module, nn.Module]:
        return self.proj_mlp, self.proj_out

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        token_mask: Tensor | None = None,
        saved_routing: dict[str, Routing] | None = None,
        return_routing: bool = False,
    ):
        num_text = encoder_hidden_states.shape[1]
        s = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(s, emb=temb)
        attn = self.attn(
            hidden_states=normed,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        routing: dict[str, Routing] = {}
        if self.num_experts:
            mask = token_mask
            if mask is not None:
                mask = F.pad(mask, (0, s.shape[1] - num_text), value=True)
            reuse = _reuse(self, "", saved_routing, normed, mask)
            out, routing[""] = self.run_beside(normed, attn, reuse, mask)
        else:
            out = self.proj_out(torch.cat([attn, self.act_mlp(self.proj_mlp(normed))], dim=2))
        s = s + gate.unsqueeze(1) * out
        if s.dtype == torch.float16:
            s = s.clip(-65504, 65504)
        c, x = s[:, :num_text], s[:, num_text:]
        return (c, x, routing) if return_routing else (c, x)


# ------------------------------------- what travels beside the tokens through the blocks


@dataclass(frozen=True)
class BlockContext:
    """What every block is given beside the tokens; all but `rotary` belong to the samples."""

    condition: Tensor  # [B, D] or [B, A], what AdaLN reads
    rotary: tuple[Tensor, Tensor]
    attention_kwargs: dict[str, Any]
    token_mask: Tensor | None  # [B, X]

    def take(self, rows: Tensor, batch: int) -> BlockContext:
        """The context of a sub-batch."""
        own = (self.condition, self.attention_kwargs, self.token_mask)
        condition, kwargs, mask = take_rows(own, rows, batch)
        return BlockContext(condition, self.rotary, kwargs, mask)

    def shorten(self) -> BlockContext:
        """The context of one text and one image token."""
        rotary = tuple(part[:2] for part in self.rotary)
        mask = None if self.token_mask is None else self.token_mask[:, :1]
        return BlockContext(self.condition, rotary, self.attention_kwargs, mask)


def take_rows(tree: Any, rows: Tensor, batch: int) -> Any:
    """The sub-batch `rows` of every tensor in `tree` whose first dimension is the batch."""
    if isinstance(tree, dict):
        return {key: take_rows(value, rows, batch) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([take_rows(value, rows, batch) for value in tree])
    batched = isinstance(tree, Tensor) and tree.ndim > 0 and tree.shape[0] == batch
    return tree[rows] if batched else tree


def add_residual(count: int, repeat: bool, samples, index: int, x: Tensor) -> Tensor:
    """Adds the ControlNet residual that belongs to block `index` of the dense model's `count`."""
    if samples is None:
        return x
    if repeat:
        return x + samples[index % len(samples)]
    return x + samples[index // -(-count // len(samples))]
