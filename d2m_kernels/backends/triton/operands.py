"""What kernels are given, in bundles: a name is written once, not in every call on its way down.

Shapes: T tokens, M rows in expert order, D model, N outputs and K inputs of an expert, S shared
neurons, F = S + E*H neurons, E experts. First what kernels read, then where it comes from.

A named tuple of pointers, strides and sizes is one argument to the JIT, and None in it an absent
tensor. Triton 3.6 to 3.9 agree as long as
- TMA descriptors are arguments of their own, bundled inside the kernel: before 3.8 the launcher
  does not look for them in a tuple;
- sizes that change from call to call (T, M) are too: do_not_specialize does not reach into a tuple;
- no bundle with None in it is returned from a function;
- no bundle as a whole is compared with None: a flag says whether it is there (PAIR);
- no bundle lies in another: 3.6 forgets, in a loop, that a stride in the inner one is 1;
- strings and extents of a constexpr bundle are read into annotated locals first.
"""

from collections import namedtuple
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from d2m_kernels.backends.triton.configs import Config

# ------------------------------------- a stream's operands, as its kernel's docstring names them

# out [M, N] and out_shared [T, S] from x; `rows` gathers x's
Stream = namedtuple(
    "Stream", "x stride_xt rows offsets w stride_wn gate stride_gn bias bias_gate out z "
    "out_shared z_shared",
)  # fmt: skip
# out [T, D] from the routed rows y2 [M, D] in expert order; `inverse` finds a token's
Routed = namedtuple("Routed", "y2 stride_yn inverse weights offsets")
# out [T, D] from h [T, S or 2S], the routed rows and what ends a block
End = namedtuple(
    "End", "h stride_ht w stride_wn gate stride_gn y2 stride_yn inverse weights offsets bias "
    "adaln stride_ab tokens_per_sample residual stride_rt out",
)  # fmt: skip
# dz and h, each [M, H] and for the shared expert [T, S], from dy [T, D] and z; partial [M, tiles]
Saved = namedtuple(
    "Saved", "dy stride_dt order offsets weights w stride_wn z z_shared dz dz_shared h h_shared "
    "partial stride_ps",
)  # fmt: skip
# out [F, D] of any strides = left^T right, group by group
Sums = namedtuple(
    "Sums", "left stride_lr left_shared stride_ls right stride_rt order offsets out stride_on "
    "stride_od",
)  # fmt: skip

# ------------------------------------------------------------------------------ a tile's operands

# TMA descriptors, or None, of a product's operands
Descriptors = namedtuple("Descriptors", "a w gate")
# rows of the left operand: these ones, or by TMA those from row0 on
Left = namedtuple("Left", "ptr stride desc rows row0")
# a group's weights from its corner (row, col) on: the columns n0 .. of its width
Right = namedtuple("Right", "ptr stride desc row col n0 width")
# The whole tiles: the shared expert's, then, a lane an expert, its first row and the next one's
# first tile. From number `whole` on the half tiles in the same order, up to all tiles.
Spans = namedtuple("Spans", "shared first stop whole shared_half stop_half total")
# what owns a tile: the shared expert, or if `routed` expert e, where E is the tail that none owns;
# its rows first .. end, outputs and corners, and the tile's number among its whole or half ones
Group = namedtuple("Group", "routed expert first end width row col bias local half")
# where expert 0's weights and bias start, and the steps to the next; the shared expert's: 0
Corners = namedtuple("Corners", "row col row_step col_step bias bias_step")


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
    FENCE: bool  # an explicit proxy fence before each product (configs.fences)


# --------------------------------------------------------------------------------- on the host


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

    def describe(self, config: Config, K: int, trans: bool):
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


NO_WEIGHTS = Weights(None, 0, 0, 0, None)


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
    return Weights(*rows_of(w2_DF), *w2_DF.shape, Corners(0, shared, 0, per_expert, 0, 0))
