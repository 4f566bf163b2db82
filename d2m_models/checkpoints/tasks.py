"""What a streamed conversion is made of: tasks, the tensors they read, permute and make.

Shapes: F neurons of an FFN.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.checkpoints.lora_file import LoRAFile
from d2m_models.checkpoints.source import Source
from d2m_models.checkpoints.tensor_files import TensorSpec, file_names, pack, write_index
from d2m_models.conversion.flux import ffn_tensors

FILE_BYTES = 5_000_000_000
_DEPTH = 3  # tensors between reader and writer


@dataclass(frozen=True)
class Task:
    """Tensors to write, and how to make them of tensors to read.

    Args:
        outputs: what is written. sources: what is read (anything with `.read()` and `.nbytes`).
        make: list of tensors read -> list of tensors to write; runs in a thread of its own.
    """

    outputs: tuple[TensorSpec, ...]
    sources: tuple[Any, ...] = ()
    make: Callable[[list[Tensor]], list[Tensor]] = list

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


def specs_of(tasks: Iterable[Task]) -> list[TensorSpec]:
    """All that the tasks write, in order."""
    return [spec for task in tasks for spec in task.outputs]


class DenseReader:
    """The dense tensors of a source, with LoRA fused and in the wanted dtype."""

    def __init__(self, source: Source, dtype: torch.dtype, lora: LoRAFile | None = None):
        self.source, self.dtype, self.lora = source, dtype, lora
        if lora is not None:
            lora.check({name: tensor.shape for name, tensor in source.tensors.items()})

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.dtype, self.source.tensors[name].shape)

    def finish(self, name: str, tensor: Tensor) -> Tensor:
        """A raw tensor with LoRA and dtype applied."""
        if self.lora is not None:
            tensor = self.lora.apply(name, tensor)
        cast = tensor.to(self.dtype)
        if self.dtype == torch.float16 and tensor.dtype != torch.float16:
            if not cast.isfinite().all() and tensor.isfinite().all():
                raise ValueError(f"{name} has values beyond fp16's range; use bfloat16")
        return cast

    def read(self, name: str) -> Tensor:
        return self.finish(name, self.source.tensors[name].read())

    def task(self, name: str, change: Callable[[Tensor], Tensor] | None = None) -> Task:
        """Copies one tensor, changed."""
        change = change or (lambda tensor: tensor)
        return Task(
            (self.spec(name),),
            (self.source.tensors[name],),
            lambda tensors: [change(self.finish(name, tensors[0]))],
        )


def permutations(
    orders: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to do with each tensor of the FFNs whose neurons move: {parameter name: function}."""
    changes = {}
    for name, order_F in orders.items():
        for key, dim, _ in ffn_tensors(name):
            first = shapes[key][dim] - order_F.numel()  # proj_out: attention columns come first
            index = torch.cat([torch.arange(first), first + order_F])
            changes[key] = partial(take, index=index, dim=dim)
    return changes


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """`index_select`; along columns numpy's is three times faster (2.2 against 0.7 GB/s)."""
    if dim == 0 or tensor.dtype.itemsize not in (2, 4):
        return tensor.index_select(dim, index)
    whole = torch.int16 if tensor.dtype.itemsize == 2 else torch.int32
    columns = tensor.view(whole).numpy().take(index.numpy(), axis=dim)
    return torch.from_numpy(columns).view(tensor.dtype)


def plan_files(tasks: Iterable[Task], limit: int) -> dict[str, list[Task]]:
    """File name -> its tasks."""
    # Tasks of 4-byte tensors come first: each tensor then starts at a multiple of its item size.
    ordered = sorted(tasks, key=lambda t: -t.outputs[0].dtype.itemsize)
    files = pack(ordered, limit)
    return dict(zip(file_names(len(files)), files, strict=True))


def describe(folder: Path, model: nn.Module, files: Mapping[str, Sequence[Task]]) -> None:
    """Writes the config and, for several files, the index that `from_pretrained` reads."""
    model.save_config(folder)
    write_index(folder, {name: specs_of(tasks) for name, tasks in files.items()})


def made_tensors(tasks: Iterable[Task], advance: Callable[[int], None]) -> Iterator[Tensor]:
    """The tasks' tensors in order; reading, making and the caller's writing overlap."""
    reader, maker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    queue: deque[tuple[Task, Future]] = deque()

    # Fresh memory costs more than reading (page faults: 45 ms for 113 MB, ten times a fill), so
    # buffers go round: when a slot comes up again, its last task has been written.
    buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_DEPTH + 2)]

    def fill(slot: int, task: Task) -> list[Tensor]:
        sizes = [-(-source.nbytes // 64) * 64 for source in task.sources]
        if sum(sizes) > buffers[slot].numel():
            buffers[slot] = torch.empty(sum(sizes), dtype=torch.uint8)
        places = buffers[slot][: sum(sizes)].split(sizes)
        return [source.read(at) for source, at in zip(task.sources, places, strict=True)]

    def make(task: Task, read: Future) -> list[Tensor]:
        return task.make(read.result())

    def next_tensors() -> Iterator[Tensor]:
        task, made = queue.popleft()
        yield from made.result()
        advance(task.nbytes)

    try:
        for slot, task in zip(cycle(range(len(buffers))), tasks, strict=False):
            read = reader.submit(fill, slot, task)
            queue.append((task, maker.submit(make, task, read)))
            if len(queue) > _DEPTH:
                yield from next_tensors()
        while queue:
            yield from next_tensors()
    finally:
        for pool in (reader, maker):
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def progress_bar(total: int, done: int, show: bool):
    """A bar over bytes; gives the function that moves it."""
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=not show) as bar:
        yield bar.update
