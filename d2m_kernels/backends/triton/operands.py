"""What kernels are given, in bundles: a name is written once, not in every call on its way down.

Shapes: T tokens, M rows in expert order, D model, N outputs and K inputs of an expert, S shared
neurons, H neurons of an expert, E experts. The first part is what kernels read, the second where
its weights and TMA descriptors come from.

A NamedTuple of pointers, strides and sizes is one argument to the JIT, and None in it an absent
tensor. Triton 3.6 to 3.9 agree as long as
- TMA descriptors are arguments of their own, bundled inside the kernel: before 3.8 the launcher
  does not look for them in a tuple;
- sizes that change from call to call (T, M) are too: do_not_specialize does not reach into a tuple;
- no bundle with None in it is returned from a function;
- no bundle as a whole is compared with None: a flag says whether it is there (PAIR);
- no bundle lies in another: 3.6 forgets, in a loop, that a stride in the inner one is 1;
- strings and extents of a constexpr bundle are read into annotated locals first.
"""

from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from d2m_kernels.backends.triton.configs import Config


class Corners(NamedTuple):
    """Where expert 0's weights and bias start, and the steps to the next; the shared one's: 0."""

    row: Any = 0
    col: Any = 0
    row_step: Any = 0
    col_step: Any = 0
    bias: Any = 0
    bias_step: Any = 0


class Product(NamedTuple):
    """How the tiles of a product are computed: constants of the compilation."""

    M: int  # rows of a tile
    N: int  # its columns
    K: int  # steps of the sum
    GROUP_M: int
    PARTS: int  # column blocks of an epilogue
    HALVES: bool  # a group's last tile, where it has at most half the rows, as half a tile
    EVEN_N: bool
    EVEN_K: bool
    PRECISION: str
    TRANS_W: bool  # W is [K, N] in memory, else [N, K]
    ACT: str
    GATED: bool  # act(A G) * (A W)
    DUAL: bool  # A[:, :K] W + A[:, K:] G


class Descriptors(NamedTuple):
    """TMA descriptors, or None, of a product's operands."""

    a: Any
    w: Any
    gate: Any = None


class Left(NamedTuple):
    """Rows of the left operand that a tile multiplies: named ones, or by TMA those from row0 on."""

    ptr: Any
    stride: Any
    desc: Any
    rows: Any
    row0: Any


class Right(NamedTuple):
    """Weights of a group, from its corner (row, col) on: columns n0 .. of its width."""

    ptr: Any
    stride: Any
    desc: Any
    row: Any
    col: Any
    n0: Any
    width: Any


class Spans(NamedTuple):
    """The shared expert's tiles; a lane an expert: its first row, the next one's first tile."""

    shared: Any
    first: Any
    stop: Any
    total: Any


class Group(NamedTuple):
    """The group that owns a tile: the shared expert, or expert e; E is the tail that none owns."""

    routed: Any
    expert: Any
    first: Any  # its rows
    end: Any
    width: Any  # its outputs
    row: Any  # its corners
    col: Any
    bias: Any
    local: Any  # the tile's number within it


class Stream(NamedTuple):
    """`grouped_gemm`: one stream's out [M, N] and out_shared [T, S] from its x and weights."""

    x: Any
    stride_xt: Any
    rows: Any
    offsets: Any
    w: Any
    stride_wn: Any
    gate: Any
    stride_gn: Any
    bias: Any
    bias_gate: Any
    out: Any
    z: Any
    out_shared: Any
    z_shared: Any


class Routed(NamedTuple):
    """`combine`: the routed rows y2 [M, D] in expert order, and which of them a token adds up."""

    y2: Any
    stride_yn: Any
    inverse: Any
    weights: Any
    offsets: Any


class End(NamedTuple):
    """`down`: one stream's out [T, D] from its h [T, S or 2S], its routed rows and its block."""

    h: Any
    stride_ht: Any
    w: Any
    stride_wn: Any
    gate: Any
    stride_gn: Any
    y2: Any
    stride_yn: Any
    inverse: Any
    weights: Any
    offsets: Any
    bias: Any
    adaln: Any
    stride_ab: Any
    tokens_per_sample: Any
    residual: Any
    stride_rt: Any
    out: Any


class Saved(NamedTuple):
    """`act_bwd`: one stream's dz and h from its dy [T, D] and its pre-activations z."""

    dy: Any
    stride_dt: Any
    order: Any
    offsets: Any
    weights: Any
    w: Any
    stride_wn: Any
    z: Any
    z_shared: Any
    dz: Any
    dz_shared: Any
    h: Any
    h_shared: Any
    partial: Any
    stride_ps: Any


class Sums(NamedTuple):
    """`wgrad`: one stream's out [F, D] = left^T right, group by group; out of any strides."""

    left: Any
    stride_lr: Any
    left_shared: Any
    stride_ls: Any
    right: Any
    stride_rt: Any
    order: Any
    offsets: Any
    out: Any
    stride_on: Any
    stride_od: Any


# ------------------------------------------------------------------------- made on the host


def rows_of(t: torch.Tensor | None) -> tuple:
    """A matrix, or its absence, and the step from one of its rows to the next."""
    return (None, 0) if t is None else (t, t.stride(0))


def descriptor(t: torch.Tensor, rows: int, cols: int, stride: int, block: list[int]):
    """A TMA descriptor of `t` seen as [rows, cols], or None where TMA cannot address it."""
    size = t.element_size()
    aligned = t.data_ptr() % 16 == 0 and stride * size % 16 == 0
    if not aligned or rows < 1 or not 1 <= cols <= stride or stride * size >= 2**40:
        return None
    return TensorDescriptor(t, [rows, cols], [stride, 1], block)


def rows_descriptor(config: Config, a: torch.Tensor, K: int):
    """Descriptor of A for groups of consecutive rows; the sum must not run into other columns."""
    if not config.tma or (a.shape[1] != K and K % config.block_k):
        return None
    return descriptor(a, a.shape[0], a.shape[1], a.stride(0), [config.block_m, config.block_k])


class Weights(NamedTuple):
    """Where the groups' weights lie: in one matrix, at equal steps.

    Covers stacked experts [E, N, K] with any outer strides and slices of a dense matrix alike.
    """

    matrix: torch.Tensor | None
    stride: int
    rows: int  # extent that a TMA descriptor may cover
    cols: int
    corners: Corners

    def describe(self, config: Config, N: int, K: int, trans: bool):
        """Its descriptor, where TMA can serve: each expert's first column 16-byte aligned, and no
        K tile reaching past the group into other numbers."""
        t, c = self.matrix, self.corners
        whole = K == (self.rows if trans else self.cols)
        if t is None or not config.tma or (K % config.block_k and not whole):
            return None
        if c.col * t.element_size() % 16 or c.col_step * t.element_size() % 16:
            return None
        block = [config.block_k, config.block_n] if trans else [config.block_n, config.block_k]
        return descriptor(t, self.rows, self.cols, self.stride, block)


NO_WEIGHTS = Weights(None, 0, 0, 0, Corners())


def stacked(w_ENK: torch.Tensor, bias_step: int = 0) -> Weights:
    """w [E, N, K] with a unit inner stride and any outer strides; its bias [E, N] likewise."""
    (E, N, K), (stride_e, stride_n, _) = w_ENK.shape, w_ENK.stride()
    row_step, col_step = divmod(stride_e, stride_n) if stride_n else (0, stride_e)
    rows, cols = (E - 1) * row_step + N, (E - 1) * col_step + K
    corners = Corners(0, 0, row_step, col_step, 0, bias_step)
    return Weights(w_ENK, stride_n, rows, cols, corners)


def neuron_rows(up_FD: torch.Tensor, shared: int, per_expert: int) -> Weights:
    """Rows shared + e * per_expert .. of w1, and of its bias, belong to expert e."""
    corners = Corners(shared, 0, per_expert, 0, shared, per_expert)
    return Weights(*rows_of(up_FD), *up_FD.shape, corners)


def neuron_columns(w2_DF: torch.Tensor, shared: int, per_expert: int) -> Weights:
    """Columns shared + e * per_expert .. of w2 belong to expert e."""
    return Weights(*rows_of(w2_DF), *w2_DF.shape, Corners(0, shared, 0, per_expert))
