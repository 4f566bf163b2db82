"""`grouped_gemm`: one matrix product an expert over ragged groups of rows, activation included.

Shapes: R rows of x, M rows of the output, E experts, N output features, K input features.
"""

from __future__ import annotations

import torch

from d2m_kernels import backends, checks
from d2m_kernels.activations import GATED, PLAIN
from d2m_kernels.op import define
from d2m_kernels.tensors import in_given_dtypes, unit

_GROUPED_GEMM = (
    "(Tensor x, Tensor w, Tensor offsets, Tensor? w_gate, Tensor? gather, Tensor? bias,"
    " Tensor? bias_gate, str? activation, str backend) -> Tensor"
)
_GROUPED_GEMM_BWD = (
    "(Tensor dout, Tensor x, Tensor w, Tensor offsets, Tensor? w_gate, Tensor? gather,"
    " Tensor? bias, Tensor? bias_gate, str? activation, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dw, Tensor dw_gate, Tensor dbias, Tensor dbias_gate)"
)


def grouped_gemm(
    x, w, offsets, *, w_gate=None, gather=None, bias=None, activation=None, backend=None
):
    """out[r] = act(x[gather[r]] w[e]^T + bias[e]) for offsets[e] <= r < offsets[e + 1].

    With `w_gate` the output is (x w^T + bias) * act(x w_gate^T + bias_gate) and `activation` is
    "geglu", "geglu_tanh" or "swiglu". Rows past offsets[E] come back as zero. Differentiable in x,
    w, w_gate and bias; an expert without rows gets gradient zero.

    Args:
        x: [R, K] bf16, fp16 or fp32 (fp64: reference only).
        w, w_gate: [E, N, K] in x's dtype, any outer strides with a unit inner stride, so that both
            stacked experts and views of a dense matrix work.
        offsets: [E + 1] int32, ascending from 0 (of `route` or `permute`).
        gather: [M] int32 rows of x, or None for x itself (M = R).
        bias: [E, N] in x's dtype, a pair of them when gated, or None.

    Returns:
        [M, N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is wrong.
    """
    checks.tensor("x", x, 2, "[R, K]")
    checks.no_transform("x")
    checks.floating("x", x)
    checks.tensor("w", w, 3, "[E, N, K]")
    E, N, K = w.shape
    if K != x.shape[1]:
        raise ValueError(f"w: expected [E, N, K = {x.shape[1]}], got {checks.shape_of(w)}")
    allowed = (*GATED,) if w_gate is not None else (None, *PLAIN)
    if activation not in allowed:
        given = "with w_gate" if w_gate is not None else "without w_gate"
        raise ValueError(f"activation: expected one of {allowed} {given}, got {activation!r}")
    if isinstance(bias, (tuple, list)):
        if w_gate is None or len(bias) != 2:
            raise ValueError("bias: a pair (up, gate) needs w_gate")
        bias, bias_gate = bias
    else:
        bias_gate = None
    weights = [("w", w)] if w_gate is None else [("w", w), ("w_gate", w_gate)]
    for name, t in weights:
        checks.shape(name, t, (E, N, K), "[E, N, K]")
        checks.unit_inner_stride(name, t)
    biases = [(n, t) for n, t in (("bias", bias), ("bias_gate", bias_gate)) if t is not None]
    for name, t in biases:
        checks.shape(name, t, (E, N), "[E, N]")
    for name, t in weights + biases:
        checks.same_device(name, t, x)
        checks.same_dtype(name, t, x.dtype)
    indices = [("offsets", offsets, (E + 1,), "[E + 1]")]
    if gather is not None:
        checks.tensor("gather", gather, 1, "[M] int32")
        indices.append(("gather", gather, tuple(gather.shape), "[M]"))
    for name, t, size, legend in indices:
        checks.shape(name, t, size, legend)
        checks.same_device(name, t, x)
        if t.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {checks.shape_of(t)}")
    name = backends.resolve(backend, x.device.type, x.dtype)
    return GroupedGemmFunction.apply(
        unit(x), w, offsets, w_gate, gather, unit(bias), unit(bias_gate), activation, name
    )


class GroupedGemmFunction(torch.autograd.Function):
    """d2m::grouped_gemm; saves its inputs and recomputes the pre-activation."""

    @staticmethod
    def forward(ctx, x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
        ctx.save_for_backward(x, w, offsets, w_gate, gather, bias, bias_gate)
        ctx.activation, ctx.backend = activation, backend
        return torch.ops.d2m.grouped_gemm.default(
            x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend
        )

    @staticmethod
    @in_given_dtypes
    def backward(ctx, dout):
        x, w, offsets, w_gate, gather, bias, bias_gate = ctx.saved_tensors
        need = ctx.needs_input_grad
        needs = [need[0], need[1], need[3], need[5], need[6]]
        grads = torch.ops.d2m.grouped_gemm_bwd.default(
            unit(dout), x, w, offsets, w_gate, gather, bias, bias_gate, ctx.activation, needs,
            ctx.backend,
        )  # fmt: skip
        dx, dw, dw_gate, db, db_gate = (g if n else None for g, n in zip(grads, needs, strict=True))
        return dx, dw, None, dw_gate, None, db, db_gate, None, None


@define("grouped_gemm", _GROUPED_GEMM)
def _grouped_gemm(x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
    return backends.module(backend).grouped_gemm(
        x, w, offsets, w_gate, gather, bias, bias_gate, activation
    )


@torch.library.register_fake("d2m::grouped_gemm")
def _(x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
    rows = x.shape[0] if gather is None else gather.shape[0]
    return x.new_empty(rows, w.shape[1])


@define("grouped_gemm_bwd", _GROUPED_GEMM_BWD)
def _grouped_gemm_bwd(
    dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs, backend
):
    gradients = backends.module(backend).grouped_gemm_bwd(
        dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs
    )
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@torch.library.register_fake("d2m::grouped_gemm_bwd")
def _(dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs, backend):
    inputs = zip((x, w, w_gate, bias, bias_gate), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need else x.new_empty(0) for t, need in inputs)
