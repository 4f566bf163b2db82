"""Proof that a converted checkpoint is its source with the neurons in another order.

Shapes: F neurons of an FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from d2m_models.adaln import adaln_linears
from d2m_models.checkpoints.calibration import BASIS, parts, read_basis
from d2m_models.checkpoints.lora_file import read_lora
from d2m_models.checkpoints.restore import DENSE_ADALN, is_refitted
from d2m_models.checkpoints.source import (
    check_dense_source,
    check_dtypes,
    check_moe_source,
    open_source,
)
from d2m_models.checkpoints.tasks import DenseReader, Task, made_tensors, permutations, progress_bar
from d2m_models.checkpoints.tensor_files import read_header
from d2m_models.conversion.flux import ffn_tensors
from d2m_models.partition import check_order
from d2m_models.topk import moe_layers


@dataclass(frozen=True)
class Verified:
    """Tensors that agree bit for bit, how many of them after permuting their neurons back, and
    compressed AdaLN tensors that agree with the basis up to rounding; refitted FFN outputs,
    of which it is only known that they are finite."""

    identical: int
    permuted: int
    compressed: int
    nbytes: int
    refitted: int = 0

    def __str__(self) -> str:
        text = (
            f"verified: {self.identical:,} tensors ({self.nbytes / 1e9:.2f} GB) equal the source "
            f"bit for bit, {self.permuted:,} of them after permuting their neurons back"
        )
        if self.compressed:
            text += f"; {self.compressed:,} compressed AdaLN tensors equal their projection"
        if self.refitted:
            text += f"; {self.refitted:,} refitted FFN outputs are finite and not compared"
        return text


def verify_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    progress: bool = True,
) -> Verified:
    """Streams source and target together and compares every tensor.

    Each FFN's stored neuron order is checked to be a permutation (or, where outputs are refitted, a
    choice of neurons), the source's tensors (LoRA fused, dtype cast) are put in that order and must
    equal the target's in every bit. Compressed AdaLN tensors
    are projected again and compared in the rounding of their dtype; routers must be finite and not
    constant.

    Raises:
        ValueError: they differ; the message names the tensor and how many elements.
    """
    dense_source = open_source(source, subfolder, variant)
    moe_source = open_source(target)
    model = check_moe_source(moe_source)
    check_dense_source(dense_source)
    dtype = check_dtypes(moe_source, None)
    reader = DenseReader(dense_source, dtype, None if lora is None else read_lora(lora, lora_scale))
    refits = is_refitted(moe_source.folder)
    orders = {
        name: check_order(
            moe_source.tensors[f"{name}.neuron_order"].read(), layer.neuron_order.numel(), name,
            copies=refits,
        )
        for name, layer in moe_layers(model).items()
    }  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in dense_source.tensors.items()}
    moved = permutations(orders, shapes)
    narrow = set(adaln_linears(model)) if model.d2m_config.adaln_dim is not None else set()
    same, pairs, refitted = [], dict(moe_source.tensors), set()
    if refits:
        for name in orders:
            down = ffn_tensors(name)[2][0]
            refitted |= {down, down.replace(".weight", ".bias")}
    side = moe_source.folder / DENSE_ADALN
    kept = read_header(side) if narrow and side.is_file() else {}
    for name in sorted(dense_source.tensors, key=dense_source.place):
        compressed = name.rpartition(".")[0] in narrow
        stored = kept.get(name) if compressed else pairs.pop(name, None)
        if stored is not None:
            spec = reader.spec(name)
            if (stored.dtype, stored.shape) != (spec.dtype, spec.shape):
                raise ValueError(
                    f"{name} is {stored.dtype} {list(stored.shape)}, the source makes it "
                    f"{spec.dtype} {list(spec.shape)}"
                )
            if name not in refitted:
                same.append((name, stored))
        elif kept or not compressed:
            where = side if compressed else moe_source.folder
            raise ValueError(f"{where} lacks {name}, which the source has")

    ours = ("router", "neuron_order", "adaln_down", *narrow)
    extra = [name for name in pairs if not any(part in name for part in ours)]
    if extra:
        raise ValueError(f"{moe_source.folder} has {extra[0]}, which the source lacks")

    def compare(name: str, tensors: list[Tensor]) -> list[Tensor]:
        expected, found = reader.finish(name, tensors[0]), tensors[1]
        _check_equal(name, found, moved.get(name, lambda t: t)(expected))
        return []

    tasks = [
        Task((reader.spec(name),), (dense_source.tensors[name], stored), partial(compare, name))
        for name, stored in same
    ]
    if narrow:
        tasks += list(_narrow_tasks(reader, moe_source, narrow))
    with progress_bar(sum(task.nbytes for task in tasks), 0, progress) as advance:
        for _ in made_tensors(tasks, advance):
            pass
    for name, stored in moe_source.tensors.items():
        if "router" in name or name in refitted:
            weight = stored.read()
            if not weight.isfinite().all() or ("router" in name and weight.std() == 0):
                raise ValueError(f"{name} is constant or not finite")
    return Verified(
        identical=len(same),
        permuted=sum(name in moved for name, _ in same),
        refitted=len(refitted),
        compressed=2 * len(narrow) + 2 * bool(narrow),
        nbytes=sum(stored.nbytes for _, stored in same),
    )


def _bits(tensor: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.contiguous().view(whole)  # so that NaN equals itself and -0 is not 0


def _check_equal(name: str, found: Tensor, expected: Tensor) -> None:
    found, expected = _bits(found), _bits(expected)
    if not torch.equal(found, expected):
        count = int((found != expected).sum())
        raise ValueError(
            f"not the source's: {name} differs in {count:,} of {found.numel():,} elements (was "
            f"it trained, made of another source, or fused with another LoRA?)"
        )


def _narrow_tasks(reader: DenseReader, target, narrow: set[str]) -> Iterator[Task]:
    path = target.folder / BASIS
    if not path.is_file():
        raise ValueError(f"{path} is missing; the compressed AdaLN cannot be verified without it")
    basis, _ = read_basis(path)
    for part, tensor in zip(("weight", "bias"), basis.down_projection(), strict=True):
        stored = target.tensors[f"adaln_down.{part}"]
        _check_close(stored.name, stored.read(), tensor.to(reader.dtype))

    def compare(linear: str, tensors: list[Tensor]) -> list[Tensor]:
        names = parts(linear)
        wide = [reader.finish(n, t) for n, t in zip(names, tensors[:2], strict=True)]
        for name, found, expected in zip(names, tensors[2:], basis.compress(*wide), strict=True):
            _check_close(name, found, expected)
        return []

    for linear in sorted(narrow):
        names = parts(linear)
        sources = [reader.source.tensors[n] for n in names] + [target.tensors[n] for n in names]
        yield Task(tuple(reader.spec(n) for n in names), tuple(sources), partial(compare, linear))


def _check_close(name: str, found: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of their dtype: another number of threads sums in another order."""
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(expected.dtype, 1e-5)
    found, expected = found.double(), expected.double()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-300))
    if not error <= limit:
        raise ValueError(f"{name} is not the source's projection: relative error {error:.2e}")
