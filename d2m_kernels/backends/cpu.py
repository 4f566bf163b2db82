"""The back-end "cpu": C++ for route, permute and combine, oneDNN (through torch) for the products.

Shapes: T tokens, D model, F hidden, E experts, K top-k, N = T*K slots, S shared neurons, H = F_e.

The experts run one after another on views of the dense weights; rows go through in blocks of at
most BLOCK_ROWS, so that besides its results a call holds one block's temporaries only, and what a
product wrote is still in the cache when the activation reads it.
"""

from __future__ import annotations

import math
import threading

import torch

from d2m_kernels import onednn
from d2m_kernels.activations import activate_, activate_backward_, activate_into, pointwise
from d2m_kernels.backends import native
from d2m_kernels.backends.reference import grouped_gemm_bwd, neurons, spans
from d2m_kernels.contract import FFNAttrs, FFNGrads, FFNInputs
from d2m_kernels.eager import each_stream, each_stream_bwd

__all__ = ["combine", "ffn_bwd", "ffn_fwd", "grouped_gemm", "grouped_gemm_bwd", "permute", "route"]

NAME = "cpu"
BLOCK_ROWS = 1024  # a [1024, 768] x [768, 3072] product still runs at full speed
WORKSPACE_BYTES = 128 << 20  # the most that a thread keeps between calls
_held = threading.local()


unavailable = native.cpu_available


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return "it serves CPU tensors only"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "it serves bf16, fp16 and fp32"
    return None


def route(x_TD, router_ED, top_k, mask_T=None):
    probs_TE, weights_TK, ids_TK = native.cpu_route(x_TD, router_ED, top_k, mask_T)
    return probs_TE, weights_TK, ids_TK, *permute(ids_TK, router_ED.shape[0])


permute = native.cpu_permute
combine = native.cpu_combine


def workspace(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Uninitialised tensors that are this thread's until it asks again.

    Memory fresh from the system costs a page fault every 4 KiB, 5% of a layer's forward for the
    routed rows of 4608 tokens; so up to WORKSPACE_BYTES are kept for the next call.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes) * dtype.itemsize
    buffer = getattr(_held, "buffer", None)
    if buffer is None or buffer.numel() < total:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside
            buffer = torch.empty(total, dtype=torch.uint8)
        if total <= WORKSPACE_BYTES:
            _held.buffer = buffer
    parts = buffer[:total].view(dtype).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def forget_workspace() -> None:
    """Give this thread's workspace back."""
    _held.__dict__.clear()


def blocks(offsets):
    """(expert, first row, end row) of blocks of at most BLOCK_ROWS rows."""
    return [
        (e, start, min(start + BLOCK_ROWS, hi))
        for e, lo, hi in spans(offsets)
        for start in range(lo, hi, BLOCK_ROWS)
    ]


def grouped_gemm(
    x, w_ENK, offsets, w_gate=None, gather=None, bias_EN=None, bias_gate=None, activation=None
):
    out = x.new_empty(x.shape[0] if gather is None else gather.shape[0], w_ENK.shape[1])
    x_block = None if gather is None else x.new_empty(min(BLOCK_ROWS, out.shape[0]), x.shape[1])
    for e, lo, hi in blocks(offsets):
        x_e = x[lo:hi]
        if gather is not None:
            x_e = native.cpu_gather_rows(x, gather[lo:hi], 1, x_block[: hi - lo])
        z = _linear(x_e, w_ENK[e], None if bias_EN is None else bias_EN[e], out[lo:hi])
        if w_gate is not None:
            gate = _linear(x_e, w_gate[e], None if bias_gate is None else bias_gate[e],
                           torch.empty_like(z))  # fmt: skip
            z.mul_(pointwise(activation, gate))
        elif activation is not None:
            activate_(activation, z)
    out[int(offsets[-1]) :] = 0
    return out


def _linear(x, w, b, out):
    """x w^T + b into `out`."""
    return _product(x, w.T, out, b)


def _product(a, b, out, base=None):
    """a b (+ base) into `out`. Where the CPU has no arithmetic of the dtype (bf16 on AVX2), a and b
    are widened to fp32 for it, and the sum is rounded once."""
    if not onednn.is_slow(a.dtype):
        return torch.mm(a, b, out=out) if base is None else torch.addmm(base, a, b, out=out)
    wide = torch.mm(a.float(), b.float())
    return out.copy_(wide if base is None else wide.add_(base))


def _fuses(s: FFNInputs, activation: str) -> bool:
    """Whether products take along bias and activation, of `onednn.EPILOGUES`: 3% of a layer.

    A strided w1 oneDNN would take, and be a thousand times slower: 2 s for 64 rows, 768 neurons.
    """
    whole = s.x.is_contiguous() and s.up.is_contiguous() and s.up.numel() > 0
    return whole and onednn.has_epilogue(s.x.dtype, activation)


def _pre_activation(x, s: FFNInputs, own, out):
    """z = x w^T + b of the neurons `own` into `out`; gated: [up | gate] side by side."""
    size = own.stop - own.start
    _linear(x, s.up[own], None if s.b_up is None else s.b_up[own], out[:, :size])
    if s.gate is not None:
        _linear(x, s.gate[own], None if s.b_gate is None else s.b_gate[own], out[:, size:])
    return out


@each_stream
def ffn_fwd(s: FFNInputs, attrs: FFNAttrs):
    shared, activation, save = attrs.shared, attrs.activation, attrs.save
    own_E, halves = neurons(s, shared), 1 if s.gate is None else 2
    width = (own_E[0].stop - own_E[0].start) * halves
    (T, K), N, D = s.weights.shape, s.order.shape[0], s.x.shape[1]

    fused = not save and _fuses(s, activation)
    # Kept for the backward pass, or one block's scratch that every part uses in turn.
    z_shared = s.x.new_empty(T, shared * halves) if save else None
    z_routed = s.x.new_empty(N, width) if save else None
    block_rows = min(BLOCK_ROWS, max(T, N))
    y_ND, x_block, scratch = workspace(
        s.x.dtype,
        (N, D),
        (block_rows if K else 0, D),
        (0 if fused else block_rows * max(shared, width // halves) * (1 if save else halves),),
    )

    def hidden(x, own, z, rows):
        """act(x w1^T + b1) of the neurons `own` on some rows; z, where it is kept, gets the sum."""
        if fused:
            return onednn.linear(x, s.up[own], None if s.b_up is None else s.b_up[own], activation)
        size = (own.stop - own.start) * (1 if save else halves)
        block = scratch[: x.shape[0] * size].view(x.shape[0], size)
        if save:
            return activate_into(activation, _pre_activation(x, s, own, z[rows]), block)
        return activate_(activation, _pre_activation(x, s, own, block))

    if shared:
        own, y_TD = slice(0, shared), torch.empty_like(s.x, memory_format=torch.contiguous_format)
        for start in range(0, T, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, T))
            _linear(hidden(s.x[rows], own, z_shared, rows), s.w2[:, own], s.b2, y_TD[rows])
    else:
        y_TD = s.x.new_zeros(T, D) if s.b2 is None else s.b2.repeat(T, 1)
    if not K:
        return y_TD, z_shared, z_routed

    for e, lo, hi in blocks(s.offsets):
        x_e = native.cpu_gather_rows(s.x, s.order[lo:hi], K, x_block[: hi - lo])
        h = hidden(x_e, own_E[e], z_routed, slice(lo, hi))
        _product(h, s.w2[:, own_E[e]].T, y_ND[lo:hi])
    slots = (y_ND, s.inverse.view(T, K), s.weights, s.offsets)
    return combine(*slots, y_TD, None, attrs.scale, out=y_TD), z_shared, z_routed


@each_stream_bwd
def ffn_bwd(dy_TD, s: FFNInputs, zs, attrs: FFNAttrs, grads: FFNGrads):
    (z_shared, z_routed), shared = zs, attrs.shared
    own_E = neurons(s, shared)
    (T, K), N, D = s.weights.shape, s.order.shape[0], s.x.shape[1]
    if shared:
        scratch = workspace(s.x.dtype, (T * shared,), (T * shared,))
        own = slice(0, shared)
        _part_bwd(own, s, attrs, dy_TD, s.x, z_shared, None, grads, scratch, grads.x)
    if grads.b2 is not None:
        torch.sum(dy_TD, 0, out=grads.b2)
    _zero_empty(own_E, s.offsets, grads)
    if K:
        largest = max((hi - lo for _, lo, hi in spans(s.offsets)), default=0)
        size = largest * (own_E[0].stop - own_E[0].start)
        rows = 0 if grads.x is None else N
        dx_ND, x_block, dy_block, *scratch = workspace(
            s.x.dtype, (rows, D), (largest, D), (largest, D), (size,), (size,)
        )
        dweights_N = s.weights.new_zeros(T * K)
        for e, lo, hi in spans(s.offsets):
            slots = s.order[lo:hi].long()
            x_e = native.cpu_gather_rows(s.x, s.order[lo:hi], K, x_block[: hi - lo])
            dy_e = native.cpu_gather_rows(dy_TD, s.order[lo:hi], K, dy_block[: hi - lo])
            factor = (attrs.scale * s.weights.view(-1)[slots, None]).to(s.x.dtype)
            dx_e = dx_ND[lo:hi] if rows else None
            sums = _part_bwd(
                own_E[e], s, attrs, dy_e, x_e, z_routed[lo:hi], factor, grads, scratch, dx_e
            )
            dweights_N[slots] = attrs.scale * sums
        if grads.weights is not None:
            grads.weights.copy_(dweights_N.view(T, K))
        if grads.x is not None:
            slots = (dx_ND, s.inverse.view(T, K), None, s.offsets)
            combine(*slots, grads.x if shared else None, None, 1.0, out=grads.x)
    elif grads.x is not None and not shared:
        grads.x.zero_()


def _part_bwd(own, s: FFNInputs, attrs, dy, x, z, factor, grads: FFNGrads, scratch, dx):
    """One expert's gradients, written into `grads` and `dx`; returns rowsum(dA' * h).

    `factor` [rows, 1] is scale * weight, None for the shared expert; the first `frozen` neurons of
    the layer have no gradient. `scratch` holds dh and h, and then dz in dh's place.
    """
    size, activation = own.stop - own.start, attrs.activation
    dh, h = (part[: dy.shape[0] * size].view(dy.shape[0], size) for part in scratch)
    _product(dy, s.w2[:, own], dh)
    h = activate_into(activation, z, h)
    sums = None if factor is None else torch.linalg.vecdot(dh.float(), h.float())
    if factor is not None:
        dh, h = dh.mul_(factor), h.mul_(factor)
    dz = activate_backward_(activation, z, dh)

    skip = min(max(attrs.frozen - own.start, 0), size)
    live = slice(own.start + skip, own.stop)
    for dw, db, first in ((grads.up, grads.b_up, 0), (grads.gate, grads.b_gate, size)):
        dz_live = dz[:, first + skip : first + size]
        if dw is not None:
            dw[own.start : live.start] = 0
            _product(dz_live.T, x, dw[live])
        if db is not None:
            db[own.start : live.start] = 0
            torch.sum(dz_live, 0, out=db[live])
    if grads.w2 is not None:
        grads.w2[:, own.start : live.start] = 0
        _product(dy.T, h[:, skip:], grads.w2[:, live])
    if dx is not None:
        _product(dz[:, :size], s.up[own], dx)
        if s.gate is not None:
            _product(dz[:, size:], s.gate[own], dx, dx)
    return sums


def _zero_empty(own_E, offsets, grads: FFNGrads):
    """Zero gradient for the neurons that no token reached."""
    reached = {e for e, _, _ in spans(offsets)}
    for own in (own_E[e] for e in range(len(own_E)) if e not in reached):
        for dw in (grads.up, grads.gate, grads.b_up, grads.b_gate):
            if dw is not None:
                dw[own] = 0
        if grads.w2 is not None:
            grads.w2[:, own] = 0
