"""Launching: TMA descriptors where they are possible, and a second try with the small tile."""

import functools
import warnings
from dataclasses import dataclass

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.configs import Config
from d2m_kernels.backends.triton.pieces import INTERPRET

# Programs that the interpreter runs one after another: more than one, so that the persistent
# loops are walked as on a GPU, and few, because each costs Python time.
_INTERPRETER_PROGRAMS = 3


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def programs(device: torch.device, per_multiprocessor: int) -> int:
    """Grid of a persistent launch."""
    if INTERPRET:
        return _INTERPRETER_PROGRAMS
    index = torch.cuda.current_device() if device.index is None else device.index
    return _multiprocessors(index) * per_multiprocessor


def launch(kernel, stage: str, config: configs.Config, device, arguments) -> None:
    """Runs a persistent kernel over the device; a tile that does not fit it becomes SMALL.

    `arguments` is a function because descriptors and evenness flags depend on the tile.
    """
    try:
        kernel[(programs(device, config.per_sm),)](**arguments(config), **config.meta())
    except OutOfResources as error:
        if config == configs.SMALL:
            raise
        _warn_once(f"{stage}: {config.name} does not fit here ({error}); using the small tile")
        launch(kernel, stage, configs.SMALL, device, arguments)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def descriptor(matrix: torch.Tensor, rows: int, cols: int, stride: int, block: list[int]):
    """A TMA descriptor of `matrix` seen as [rows, cols], or None where TMA cannot address it."""
    size = matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and stride * size % 16 == 0
    if not aligned or rows < 1 or not 1 <= cols <= stride or stride * size >= 2**40:
        return None
    return TensorDescriptor(matrix, [rows, cols], [stride, 1], block)


def rows_descriptor(config: configs.Config, a: torch.Tensor, K: int):
    """Descriptor of A for groups of consecutive rows; the sum must not run into other columns."""
    if not config.tma or (a.shape[1] != K and K % config.block_k):
        return None
    return descriptor(a, a.shape[0], a.shape[1], a.stride(0), [config.block_m, config.block_k])


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(max(n, 1)))


def numbered(streams: list[dict]) -> dict:
    """Kernel arguments of one or two streams: the second's names end in _2, absent they are None.

    Sizes of an absent stream are zero.
    """
    first, *more = streams
    second = more[0] if more else {n: 0 if isinstance(v, int) else None for n, v in first.items()}
    return first | {f"{name}_2": value for name, value in second.items()}


# ------------------- where the experts' weights lie: in one matrix, at equal steps


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
