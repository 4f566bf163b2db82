"""Parameters and FLOPs of a FLUX model, dense or converted, in closed form.

Shapes: D width, F neurons of an FFN, F_a activated ones, A AdaLN input, I image tokens, X text
tokens, S = X + I. FLOPs count the matrix products of one forward with batch 1, two per
multiply-add; attention is 4 S^2 D a block (the convention of `torch.utils.flop_counter`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from d2m_models.config import FluxMoEConfig, MoEConfig, group_names
from d2m_models.presets import find_preset

_TIME_CHANNELS = 256  # width of FLUX's sinusoidal timestep features


@dataclass(frozen=True)
class Part:
    """One row of the account: parameters held, parameters one token meets, FLOPs of a forward."""

    total: int = 0
    activated: float = 0
    activated_paper: float = 0
    flops: float = 0
    attention_flops: float = 0

    def __add__(self, other: Part) -> Part:
        return Part(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> Part:
        """All but the parameters held, times the share of forwards that run this part."""
        total, *rest = astuple(self)
        return Part(total, *(factor * value for value in rest))


@dataclass(frozen=True)
class Account:
    """What a model holds and what a forward costs.

    Attributes:
        total_params: all parameters.
        activated_params: those that one token meets (k experts, kappa blocks of each group).
        activated_params_paper: the same by the convention that reproduces the paper's Table 1: the
            text stream's FFN of MoE double blocks is left out, and with AdaLN compression the
            conditioning embedders count as A wide too.
        flops: FLOPs of a forward at batch 1, attention in full.
        flops_half_attention: the same with attention counted as multiply-adds.
        parts: the account by kind of module.
    """

    total_params: int
    activated_params: int
    activated_params_paper: int
    flops: float
    flops_half_attention: float
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class _Architecture:
    """Sizes of a FLUX model; the defaults are FLUX.1 [dev]."""

    dim: int = 3072
    head_dim: int = 128
    in_channels: int = 64
    out_channels: int = 64
    joint_dim: int = 4096
    pooled_dim: int = 768
    guidance: bool = True
    ff_dims: Mapping[str, int] = field(default_factory=dict)
    top_k: Mapping[str, int | str] = field(default_factory=dict)

    def hidden(self, name: str) -> int:
        return self.ff_dims.get(name, 4 * self.dim)


def account(
    model_or_config: Any,
    height: int = 1024,
    width: int = 1024,
    text_tokens: int = 512,
    image_tokens: int | None = None,
) -> Account:
    """Counts a model, or a FLUX.1 [dev] of the given configuration.

    Args:
        model_or_config: a FLUX model (ours or diffusers', on any device), a `FluxMoEConfig`, a bare
            `MoEConfig` or a preset name.
        height, width: image size in pixels, multiples of 16 (one token is 16 x 16 pixels).
        text_tokens: X.
        image_tokens: I, in place of height and width.
    """
    for name, value, low in (
        ("height", height, 16),
        ("width", width, 16),
        ("text_tokens", text_tokens, 0),
        ("image_tokens", 1 if image_tokens is None else image_tokens, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an int >= {low}, got {value!r}")
    if height % 16 or width % 16:
        raise ValueError(f"height and width must be multiples of 16, got {height} x {width}")
    config, sizes = _resolve(model_or_config)
    if image_tokens is None:
        image_tokens = (height // 16) * (width // 16)
    parts = _count(config, sizes, image_tokens, text_tokens)
    whole = sum(parts.values(), Part())
    flops = whole.flops + whole.attention_flops
    return Account(
        total_params=whole.total,
        activated_params=round(whole.activated),
        activated_params_paper=round(whole.activated_paper),
        flops=flops,
        flops_half_attention=flops - whole.attention_flops / 2,
        parts=parts,
    )


def _resolve(source: Any) -> tuple[FluxMoEConfig, _Architecture]:
    if isinstance(source, str):
        return find_preset(source), _Architecture()
    if isinstance(source, MoEConfig):
        return FluxMoEConfig(moe=source, dense_double_blocks=()), _Architecture()
    if isinstance(source, FluxMoEConfig):
        return source, _Architecture()
    if not hasattr(source, "single_transformer_blocks") or not hasattr(source, "config"):
        raise TypeError(
            "account takes a FLUX model, a FluxMoEConfig, a MoEConfig or a preset name, got "
            f"{type(source).__name__}"
        )
    given = source.config
    config = getattr(source, "d2m_config", None) or FluxMoEConfig(
        moe=None,
        dense_double_blocks=(),
        num_layers=given.num_layers,
        num_single_layers=given.num_single_layers,
    )
    sizes = _Architecture(
        dim=given.num_attention_heads * given.attention_head_dim,
        head_dim=given.attention_head_dim,
        in_channels=given.in_channels,
        out_channels=given.patch_size**2 * (given.out_channels or given.in_channels),
        joint_dim=given.joint_attention_dim,
        pooled_dim=given.pooled_projection_dim,
        guidance=given.guidance_embeds,
        ff_dims=dict(given.get("ff_dims") or {}),
        top_k={n: m.top_k for n, m in source.named_modules() if getattr(m, "num_experts", 0)},
    )
    return config, sizes


def _linear(n_in: int, n_out: int, tokens: int, bias: bool = True) -> Part:
    params = n_in * n_out + n_out * bias
    return Part(params, params, params, 2 * n_in * n_out * tokens)


def _unlearned_norms(count: int) -> Part:
    return Part(count, count, count)


def _mlp_embedder(n_in: int, dim: int, paper_dim: int) -> Part:
    """Linear-silu-Linear to `dim`; the paper's convention counts `paper_dim` in its place."""
    part = _linear(n_in, dim, 1) + _linear(dim, dim, 1)
    paper = _linear(n_in, paper_dim, 1) + _linear(paper_dim, paper_dim, 1)
    return Part(part.total, part.activated, paper.activated, part.flops)


def _ffn(
    sizes: _Architecture, moe: MoEConfig | None, name: str, tokens: int, in_paper: bool = True
) -> Part:
    """An FFN, w1 [F, D], b1 [F], w2 [D, F] without b2, of which F_a neurons run for a token."""
    dim, hidden = sizes.dim, sizes.hidden(name)
    active, router = hidden, 0
    if moe is not None:
        shared, expert = moe.sizes(dim, hidden)
        router = moe.num_experts * dim
        top_k = sizes.top_k.get(name, moe.top_k)
        if top_k != "dense":
            active = shared + top_k * expert
    total = hidden * (2 * dim + 1) + router
    activated = active * (2 * dim + 1) + router
    flops = 2 * tokens * (2 * dim * active + router)
    return Part(total, activated, activated if in_paper else 0, flops)


def _count(config: FluxMoEConfig, sizes: _Architecture, image: int, text: int) -> dict[str, Part]:
    dim, both = sizes.dim, image + text
    narrow = config.adaln_dim or dim
    embedders = _mlp_embedder(_TIME_CHANNELS, dim, narrow)
    if sizes.guidance:
        embedders += _mlp_embedder(_TIME_CHANNELS, dim, narrow)
    embedders += _mlp_embedder(sizes.pooled_dim, dim, narrow)
    parts = {
        "conditioning": embedders,
        "in_out": _linear(sizes.in_channels, dim, image)
        + _linear(sizes.joint_dim, dim, text)
        + _linear(dim, sizes.out_channels, image),
        "adaln": _linear(narrow, 2 * dim, 1),
        "attention": Part(),
        "ffn": Part(),
        "routers": Part(),
    }
    if config.adaln_dim is not None:
        down = _linear(dim, narrow, 1)
        parts["adaln"] += Part(down.total, down.activated, 0, down.flops)
    attention = Part(attention_flops=4 * both * both * dim)
    groups = group_names(config).values()
    # share of forwards in which a grouped block runs, kappa / m
    share = {name: config.mob.active / len(names) for names in groups for name in names}
    for i in range(config.num_layers):
        moe = None if i in config.dense_double_blocks else config.moe
        part = share.get(name := f"transformer_blocks.{i}", 1.0)
        parts["adaln"] += _linear(narrow, 12 * dim, 1).times(part)
        projections = _linear(dim, 4 * dim, image) + _linear(dim, 4 * dim, text)
        norms = _unlearned_norms(4 * sizes.head_dim)
        parts["attention"] += (projections + norms + attention).times(part)
        ffn = _ffn(sizes, moe, f"{name}.ff", image) + _unlearned_norms(dim)
        context = _ffn(sizes, moe, f"{name}.ff_context", text, in_paper=moe is None)
        context += Part(dim, dim, dim if moe is None else 0)
        parts["ffn"] += (ffn + context).times(part)
    for i in range(config.num_single_layers):
        moe = None if i in config.dense_single_blocks else config.moe
        part = share.get(name := f"single_transformer_blocks.{i}", 1.0)
        parts["adaln"] += _linear(narrow, 3 * dim, 1).times(part)
        projections = _linear(dim, 4 * dim, both)  # q, k, v and the attention part of proj_out
        norms = _unlearned_norms(2 * sizes.head_dim)
        parts["attention"] += (projections + norms + attention).times(part)
        parts["ffn"] += _ffn(sizes, moe, name, both).times(part)
    for names in groups:
        for tokens in (2, 0):  # of two gates; W_y's one product is counted with W_x's
            parts["routers"] += _linear(dim, len(names), tokens, bias=False)
    return parts
