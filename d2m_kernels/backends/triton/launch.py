"""Launching: over the whole device, one or two streams, and a second try with the small tile."""

import functools
import threading
import warnings

import torch
import triton
from triton.runtime.errors import OutOfResources

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.operands import Product
from d2m_kernels.backends.triton.pieces import INTERPRET, even, pointwise_name, precision

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


TICKET_BYTES = 128
# .launches, where it is a list, is given (compiled kernel, grid, arguments) of every launch below
recorder = threading.local()


def tickets(device: torch.device, launches: int):
    """A zeroed counter for each launch of a call on a device, a line of L2 each.

    The zeros are written in the call's own stream, and again whenever a CUDA graph is replayed.
    Counters of a call's own, unlike one that lies with the routing, are right also where two calls
    share a routing, at the same time or one after the other.
    """
    counters = torch.zeros(launches, TICKET_BYTES // 4, dtype=torch.int32, device=device)
    return iter(counters.unbind())


def launch(kernel, stage: str, config: configs.Config, device, arguments, ticket) -> None:
    """Runs a persistent kernel over the device; a tile that does not fit it becomes SMALL.

    `arguments` is a function because descriptors and evenness flags depend on the tile.
    """
    grid = (programs(device, config.per_sm), 1, 1)
    given = arguments(config) | dict(ticket_ptr=ticket if config.tickets else None)
    try:
        compiled = kernel[grid](**given, **config.meta())
    except OutOfResources as error:
        if config == configs.SMALL:
            raise
        _warn_once(f"{stage}: {config.name} does not fit here ({error}); using the small tile")
        return launch(kernel, stage, configs.SMALL, device, arguments, ticket)
    if getattr(recorder, "launches", None) is not None:
        ordered = tuple(given[name] for name in kernel.arg_names)
        recorder.launches.append((compiled, grid, ordered))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(max(n, 1)))


def product(
    config: configs.Config, x, widths, K, most, trans=False, act=None, gated=False, dual=False,
    approx=False,
) -> Product:  # fmt: skip
    """Tiles of `config` for outputs of these `widths` and sums over K of a launch on x.

    `most`: how many of an epilogue's numbers a thread may hold at a time. `approx`: whether the
    activation may be off by half a rounding of bf16.
    """
    multiplied = precision(x.dtype)
    fence = config.fence and (x.element_size() == 2 or multiplied == "tf32")
    return Product(
        config.block_m, config.block_n, config.block_k, config.group_m, config.parts(most),
        config.halves, all(even(width, config.block_n) for width in widths),
        even(K, config.block_k), multiplied, trans, pointwise_name(act, approx), gated, dual,
        fence and configs.fences(x.device),
    )  # fmt: skip


def numbered(streams: list[dict]) -> dict:
    """Kernel arguments of one or two streams: a second's names end in _2; absent, they are None.

    Sizes of an absent stream are zero. PAIR says whether there is one.
    """
    first, *more = streams
    second = more[0] if more else {n: 0 if isinstance(v, int) else None for n, v in first.items()}
    return first | {f"{name}_2": value for name, value in second.items()} | dict(PAIR=bool(more))
