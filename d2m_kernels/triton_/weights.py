"""Where the experts' weights lie: in one matrix, at equal steps, whatever its layout.

Shapes: E experts, N outputs and K inputs of an expert, D model, F = S + E*H neurons.
"""

from dataclasses import dataclass

import torch

from d2m_kernels.triton_.configs import Config
from d2m_kernels.triton_.launch import descriptor


@dataclass(frozen=True)
class Weights:
    """Where the groups' weights lie in one matrix: expert e's corner is (row, col) + e * step.

    Covers stacked experts [E, N, K] with any outer strides and slices of a dense matrix alike.
    """

    matrix: torch.Tensor
    stride: int
    rows: int  # extent that a TMA descriptor may cover
    cols: int
    row: int = 0
    col: int = 0
    row_step: int = 0
    col_step: int = 0

    def describe(self, config: Config, N: int, K: int, trans: bool):
        """Its descriptor, where TMA can serve: each expert's first column 16-byte aligned, and no
        K tile reaching past the group into other numbers."""
        whole = self.rows == K if trans else self.cols == K
        size = self.matrix.element_size()
        aligned = self.col * size % 16 == 0 and self.col_step * size % 16 == 0
        if not config.tma or not aligned or (K % config.block_k and not whole):
            return None
        block = [config.block_k, config.block_n] if trans else [config.block_n, config.block_k]
        return descriptor(self.matrix, self.rows, self.cols, self.stride, block)


def stacked(w_ENK: torch.Tensor) -> Weights:
    """w [E, N, K] with a unit inner stride and any outer strides."""
    E, N, K = w_ENK.shape
    stride_e, stride_n = w_ENK.stride(0), w_ENK.stride(1)
    row_step, col_step = divmod(stride_e, stride_n) if stride_n else (0, stride_e)
    rows, cols = (E - 1) * row_step + N, (E - 1) * col_step + K
    return Weights(w_ENK, stride_n, rows, cols, 0, 0, row_step, col_step)


def neuron_rows(up_FD: torch.Tensor, shared: int, per_expert: int) -> Weights:
    """Rows shared + e * per_expert .. of w1 belong to expert e."""
    return Weights(up_FD, up_FD.stride(0), *up_FD.shape, row=shared, row_step=per_expert)


def neuron_columns(w2_DF: torch.Tensor, shared: int, per_expert: int) -> Weights:
    """Columns shared + e * per_expert .. of w2 belong to expert e."""
    return Weights(w2_DF, w2_DF.stride(0), *w2_DF.shape, col=shared, col_step=per_expert)
