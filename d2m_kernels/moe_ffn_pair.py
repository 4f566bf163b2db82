"""Two streams of tokens, each with a router and weights of its own, through their MoE FFNs at once.

Shapes: T tokens, D model, F hidden = S shared + E * H, E experts, K top-k.

A FLUX double block has an FFN for the image tokens and one for the text tokens. Alone, 512 text
tokens leave most of a GPU idle; together, each stage of both is one launch over all their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from d2m_kernels import backends
from d2m_kernels.contract import Routing
from d2m_kernels.moe_ffn import Call, prepare, run


@dataclass(frozen=True)
class Stream:
    """The arguments of one `moe_ffn` call, under its names and with its defaults."""

    x: torch.Tensor  # [..., D]
    router: torch.Tensor  # [E, D]
    w1: Any  # [F, D], [2F, D] or a pair
    w2: torch.Tensor  # [D, F]
    b1: Any = None
    b2: torch.Tensor | None = None
    top_k: int | str = 2
    shared: int = 0
    activation: str = "gelu_tanh"
    gate_first: bool = False
    routed_scale: float = 1.0
    token_mask: torch.Tensor | None = None
    routing: Routing | None = None
    freeze_shared: bool = False
    modulation: tuple[torch.Tensor, torch.Tensor] | None = None
    norm_eps: float = 1e-6
    gate: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def moe_ffn_pair(first: Stream, second: Stream, *, backend=None, return_routing=False):
    """(moe_ffn(first), moe_ffn(second)), with one launch a stage for both where that is possible.

    Contract, semantics and gradients are those of two `moe_ffn` calls. The streams may differ in
    the number and shape of their tokens, in biases, masks, routings, modulation, gate and residual;
    where they differ in anything else (`why_two_calls` says in what) they run one after the other.

    Args:
        first, second: the streams, e.g. image and text tokens.
        backend: as in `moe_ffn`, for both. "triton", and "cuda" where Triton makes its products,
            group the streams; the others run them one after another.
        return_routing: also return each stream's `Routing`.

    Returns:
        (y_first, y_second), or ((y_first, Routing), (y_second, Routing)).

    Raises:
        TypeError, ValueError: as `moe_ffn`; the message starts with "first: " or "second: ".
        RuntimeError: the requested back-end cannot serve this device or dtype.
    """
    pair = (first, second)
    calls = tuple(
        _prepare(name, stream, backend, return_routing)
        for name, stream in zip(("first", "second"), pair, strict=True)
    )
    ys = [y for call in calls for y in run(call)] if _difference(*calls) else run(*calls)
    ys = tuple(y.view_as(s.x) for y, s in zip(ys, pair, strict=True))
    if not return_routing:
        return ys
    return tuple((y, call.routing) for y, call in zip(ys, calls, strict=True))


def why_two_calls(first: Stream, second: Stream, *, backend=None) -> str | None:
    """Why `moe_ffn_pair` runs these two one after the other, or None if they share launches."""
    with torch.no_grad():
        calls = [
            _prepare(name, stream, backend, False)
            for name, stream in (("first", first), ("second", second))
        ]
    difference = _difference(*calls)
    if difference is None and not backends.groups_streams(calls[0].backend):
        return f"the back-end {calls[0].backend} runs streams one after another"
    return difference


def _prepare(name: str, stream: Stream, backend, return_routing) -> Call:
    if not isinstance(stream, Stream):
        raise TypeError(f"{name}: expected a Stream, got {type(stream).__name__}")
    try:
        arguments = [getattr(stream, f.name) for f in _FIELDS]
        return prepare(*arguments, backend, return_routing)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


_FIELDS = fields(Stream)


def _difference(a: Call, b: Call) -> str | None:
    """What keeps two calls from sharing launches, or None."""

    def sizes(call: Call):
        s, attrs = call.stream, call.attrs
        return dict(
            D=s.x.shape[1], F=s.w2.shape[1], E=s.offsets.shape[0] - 1, top_k=s.weights.shape[1],
            neurons_of_every_token=attrs.shared, activation=attrs.activation,
            gate_first=attrs.gate_first, routed_scale=attrs.scale, frozen=attrs.frozen,
            dtype=s.x.dtype, device=s.x.device, backend=call.backend,
        )  # fmt: skip

    one, two = sizes(a), sizes(b)
    for name in one:
        if one[name] != two[name]:
            return f"the streams differ in {name}: {one[name]} and {two[name]}"
    if torch.compiler.is_compiling() and _common_tensor(a.stream, b.stream):
        return "they share a tensor, which Dynamo does not allow an autograd.Function"
    return None


def _common_tensor(a, b) -> bool:
    return any(t is u for t in a if t is not None for u in b)
