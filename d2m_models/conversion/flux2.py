"""FLUX.2's single-stream blocks, whose FFN is fused with attention into two Linears.

Shapes: B samples, S tokens, D width, C attention width, F neurons.

    to_qkv_mlp_proj [3C + 2F, D]   rows: [q | k | v | gate | up]
    to_out          [D, C + F]     columns: [attention | mlp]

The FFN's part of both becomes the MoE layer, as views; q, k, v and attention stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from d2m_models.config import MoEConfig, MoEShare
from d2m_models.moe import ExpertLayer
from d2m_models.private import attention_options

try:
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2ParallelSelfAttention,
        Flux2ParallelSelfAttnProcessor,
    )
except ImportError:  # without diffusers, `convert` serves other models
    Flux2ParallelSelfAttention = None


def parallel_attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The fused modules of a FLUX.2 model by name."""
    if Flux2ParallelSelfAttention is None:
        return []
    return [(n, m) for n, m in model.named_modules() if type(m) is Flux2ParallelSelfAttention]


def convert_parallel(attention: nn.Module, config: MoEConfig | MoEShare) -> nn.Module:
    """Turns one fused module into an MoE layer, in place: parameters keep their names."""
    attention.__class__ = MoEParallelSelfAttention
    weight = attention.to_out.weight
    attention.add_experts(
        attention.query_dim, attention.mlp_hidden_dim, config, "swiglu", gate_first=True
    )
    attention.router.to(weight.device)
    attention.neuron_order = attention.neuron_order.to(weight.device)
    attention.set_processor(MoEParallelProcessor())
    return attention.train(attention.training)


if Flux2ParallelSelfAttention is not None:

    class MoEParallelSelfAttention(Flux2ParallelSelfAttention, ExpertLayer):
        """`Flux2ParallelSelfAttention` that routes its FFN part; made by `convert_parallel`."""

        def linears(self) -> tuple[nn.Module, nn.Module]:
            return self.to_qkv_mlp_proj, self.to_out

    class MoEParallelProcessor(Flux2ParallelSelfAttnProcessor):
        """Attention as diffusers computes it, plus the MoE layer's output."""

        def __call__(
            self,
            attn: MoEParallelSelfAttention,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            image_rotary_emb: Any = None,
        ) -> Tensor:
            x_BSD, width = hidden_states, attn.inner_dim

            def attend(w_XD: Tensor, b_X: Tensor | None, w_out_DX: Tensor) -> Tensor:
                bias = None if b_X is None else b_X[: 3 * width]
                qkv = F.linear(x_BSD, w_XD[: 3 * width], bias)
                q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv.chunk(3, dim=-1))
                q, k = attn.norm_q(q), attn.norm_k(k)
                if image_rotary_emb is not None:
                    q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
                    k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
                out = dispatch_attention_fn(
                    q, k, v, attn_mask=attention_mask, **attention_options(self)
                )
                return F.linear(out.flatten(2, 3).to(q.dtype), w_out_DX[:, :width])

            y_BSD, _ = attn.run_experts(
                x_BSD, *attn.linears(), first_column=width, also=attend, first_row=3 * width
            )
            return y_BSD
