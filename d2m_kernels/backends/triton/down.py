"""Down-projection of the shared expert, with the combine in its epilogue.

Shapes: T tokens, D model, S shared neurons, K top-k, N = T*K slots. The routed experts' rows y2
[N, D] (in expert order) come from an earlier launch; these tiles gather and add them while their
own sum is still in registers, which saves writing and re-reading [T, D] (2 x 28 MB of 208 MB at
T = 4608). In the backward pass the same launch makes dx: h is then dz, w2 is w1 read the other way.
Two streams, each with weights of its own, go in one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.combine import _add_routed
from d2m_kernels.backends.triton.launch import launch, numbered, product
from d2m_kernels.backends.triton.operands import (
    NO_WEIGHTS,
    Descriptors,
    End,
    Left,
    Right,
    Weights,
    rows_descriptor,
    rows_of,
)
from d2m_kernels.backends.triton.pieces import _grouped, _matmul, _next_tile, _parts, _rounded


@triton.jit
def _add_and_store(acc, s, live, t, T, n0, D, top_k, scale, WIDTH: tl.constexpr):
    """out[t] = residual[t] + adaln[sample of t] * (acc + bias + the routed rows of t)."""
    offs_n = n0 + tl.arange(0, WIDTH)
    t_ok = t < T
    n_ok = offs_n < D
    mask = t_ok[:, None] & n_ok[None, :]
    t_long = t.to(tl.int64)
    if s.bias is not None:
        acc += tl.load(s.bias + offs_n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if s.y2 is not None:
        acc = _add_routed(acc, s, live, t, t_ok, offs_n, n_ok, top_k, scale)
    if s.adaln is not None:
        sample = t_long // s.tokens_per_sample
        ptrs = s.adaln + (sample * s.stride_ab)[:, None] + offs_n[None, :]
        acc *= tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if s.residual is not None:
        ptrs = s.residual + (t_long * s.stride_rt)[:, None] + offs_n[None, :]
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = s.out + (t_long * D)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, _rounded(acc, s.out.dtype.element_ty), mask=mask)


@triton.jit
def _down_tiles(tile, first, s, d, T, D, S, E, top_k, scale, ticket_ptr, P: tl.constexpr):
    """This program's tiles, from `tile` on, of a stream whose first has the number `first`.

    Returns the program's next tile and the number after the stream's last.
    """
    M: tl.constexpr = P.M
    N: tl.constexpr = P.N
    PARTS: tl.constexpr = P.PARTS
    tiles_m = tl.cdiv(T, M)
    tiles_n = tl.cdiv(D, N)
    live = 0
    if s.y2 is not None:
        live = tl.load(s.offsets + E)
    last = first + tiles_m * tiles_n
    while tile < last:
        m, n = _grouped(tile - first, tiles_m, tiles_n, P.GROUP_M)
        n0 = n * N
        t = m * M + tl.arange(0, M)
        h = Left(s.h, s.stride_ht, d.a, tl.minimum(t, T - 1), m * M)
        w = Right(s.w, s.stride_wn, d.w, 0, 0, n0, D)
        acc = _matmul(tl.zeros((M, N), dtype=tl.float32), h, 0, w, S, S, P)
        if P.DUAL:
            gate = Right(s.gate, s.stride_gn, d.gate, 0, 0, n0, D)
            acc = _matmul(acc, h, S, gate, S, S, P)
        tile = _next_tile(tile, ticket_ptr)
        pieces = _parts(acc, PARTS)
        for i in tl.static_range(PARTS):
            _add_and_store(pieces[i], s, live, t, T, n0 + i * (N // PARTS), D, top_k, scale,
                           N // PARTS)  # fmt: skip
    return tile, last


@triton.jit(do_not_specialize=["T", "T_2"])
def _down_fwd_kernel(
    s, T, h_desc, w_desc, gate_desc, s_2, T_2, h_desc_2, w_desc_2, gate_desc_2,
    D, S, E, top_k, scale, ticket_ptr, PAIR: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out = h[:, :S] W (+ h[:, S:] G when DUAL) + bias + scale * sum_j weights[:, j] * y2[...].

    A PAIR's second stream continues the list of tiles where the first one ends.
    """
    tile, last = _down_tiles(tl.program_id(0), 0, s, Descriptors(h_desc, w_desc, gate_desc), T, D,
                             S, E, top_k, scale, ticket_ptr, P)  # fmt: skip
    if PAIR:
        _down_tiles(tile, last, s_2, Descriptors(h_desc_2, w_desc_2, gate_desc_2), T_2, D, S, E,
                    top_k, scale, ticket_ptr, P)  # fmt: skip


@dataclass
class Shared:
    """One stream's tensors of a launch: out [T, D] from h [T, S or 2S] and the routed rows y2."""

    h: torch.Tensor
    weights: Weights
    out: torch.Tensor
    offsets: torch.Tensor
    y2: torch.Tensor | None = None  # [N, D]
    inverse_TK: torch.Tensor | None = None
    weights_TK: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gate: Weights | None = None  # second matrix of a sum over both halves of h
    adaln_BD: torch.Tensor | None = None
    residual_TD: torch.Tensor | None = None

    def arguments(self, config, S: int, trans: bool) -> dict:
        T, w, gate, adaln = self.out.shape[0], self.weights, self.gate or NO_WEIGHTS, self.adaln_BD
        s = End(
            *rows_of(self.h), *w[:2], *gate[:2], *rows_of(self.y2), self.inverse_TK,
            self.weights_TK, self.offsets, self.bias, *rows_of(adaln),
            1 if adaln is None else T // adaln.shape[0], *rows_of(self.residual_TD), self.out,
        )  # fmt: skip
        return dict(
            s=s, T=T, h_desc=rows_descriptor(config, self.h, S),
            w_desc=w.describe(config, S, trans), gate_desc=gate.describe(config, S, trans),
        )  # fmt: skip


def down_shared(stage, streams: list[Shared], ticket, *, S: int, scale=1.0, trans=False):
    """Launches the kernel for one or two streams, over the first S neurons of their weights."""
    streams = [s for s in streams if s.out.numel()]
    if not streams:
        return
    large = max(streams, key=lambda s: s.out.shape[0])  # its sizes choose the tile
    T, D = large.out.shape
    plain = all(s.adaln_BD is None and s.residual_TD is None for s in streams)

    def arguments(config):
        return numbered([s.arguments(config, S, trans) for s in streams]) | dict(
            D=D, S=S, E=large.offsets.shape[0] - 1,
            top_k=0 if large.inverse_TK is None else large.inverse_TK.shape[1], scale=float(scale),
            P=product(config, large.h, (D,), S, 32 if plain else 16, trans,
                      dual=large.gate is not None),
        )  # fmt: skip

    config = configs.select(stage, large.h, T, D, (D, S))
    if large.gate is not None and S % config.block_k:
        config = configs.unbounded(config)
    launch(_down_fwd_kernel, stage, config, large.h.device, arguments, ticket)
