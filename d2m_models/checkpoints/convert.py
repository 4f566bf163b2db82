"""FLUX checkpoints converted on disk, tensor by tensor: nothing larger than a tensor is in memory.

Shapes: F neurons of an FFN, D width, A AdaLN input, n calibration samples.

`convert_checkpoint` writes what `convert_flux(...).save_pretrained` would, `checkpoint_to_dense`
what `to_dense(...)` would. Both resume after a kill, see `jobs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.adaln import AdaLNBasis, adaln_linears
from d2m_models.checkpoints.calibration import adaln_basis, digest_of, load_calibration, load_orders
from d2m_models.checkpoints.jobs import Job, Task, check_target, run_job
from d2m_models.checkpoints.lora_file import read_lora
from d2m_models.checkpoints.reading import SHARD_BYTES, DenseReader, permutations, plan_files, same
from d2m_models.checkpoints.restore import DENSE_ADALN
from d2m_models.checkpoints.source import check_dense_source, check_dtypes, open_source
from d2m_models.checkpoints.tensor_files import TensorSpec, write_index, write_json
from d2m_models.config import FluxMoEConfig, MoEConfig
from d2m_models.conversion.flux import model_arguments
from d2m_models.flux import FluxMoETransformer2DModel
from d2m_models.moe import ROUTER_STD
from d2m_models.presets import resolve_config

RECORD = "d2m_conversion.json"


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    config: FluxMoEConfig | MoEConfig | str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    neuron_order: str | Path | Mapping[str, Tensor] | None = None,
    adaln_calibration: str | Path | Tensor | None = None,
    keep_adaln: bool = False,
    lora: str | Path | None = None,
    lora_scale: float | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict[str, Any]:
    """Converts a saved FLUX transformer into a folder for `from_pretrained`.

    Args:
        source, subfolder, variant: see `open_source`.
        target: folder that does not exist yet.
        config: as for `convert_flux`. "hyper-..." presets need a `lora`.
        neuron_order: {FFN name: order} or a safetensors file of that; None keeps the dense order.
        adaln_calibration: temb samples [n, D], or a safetensors file with them as "temb".
        keep_adaln: also write the dense AdaLN tensors, which `checkpoint_to_dense` needs.
        lora, lora_scale: fused into the dense weights first; scale 1, for "hyper-..." 0.125.
        dtype: of the result, by default the source's; routers are fp32.
        seed: of the routers (and of the stand-in calibration).

    Returns:
        The record that is also written as d2m_conversion.json, with the AdaLN errors.
    """
    target = Path(target).expanduser()
    check_target(target)  # before anything that takes time
    opened = open_source(source, subfolder, variant)
    dense = check_dense_source(opened)
    out_dtype = check_dtypes(opened, dtype)
    structure = resolve_config(
        config, len(dense.transformer_blocks), len(dense.single_transformer_blocks)
    )
    if _is_hyper(config) and lora is None:
        raise ValueError(
            f"{config} is {config.removeprefix('hyper-')} from a teacher into which a few-step "
            f"LoRA is fused: pass --lora FILE (Hyper-SD's 8-step LoRA for FLUX.1 [dev])"
        )
    if lora is None and lora_scale is not None:
        raise ValueError("lora_scale is given without a lora")
    fused = None if lora is None else read_lora(lora, default_lora_scale(config, lora_scale))
    reader = DenseReader(opened, out_dtype, fused)
    student = meta_student(dense, structure)
    orders = load_orders(neuron_order, student)
    compress = structure.adaln_dim is not None
    for name, value in (("keep_adaln", keep_adaln), ("adaln_calibration", adaln_calibration)):
        if not compress and value is not None and value is not False:
            raise ValueError(f"{name} is for a compressed AdaLN, this configuration has none")
    temb_nD = load_calibration(adaln_calibration, dense.inner_dim) if compress else None

    files = plan_files(_student_tasks(reader, student, orders, seed, box := {}), shard_bytes)
    record = {
        "source": {"tensors": opened.digest(), "dtype": str(out_dtype)},
        "structure": structure.to_dict(),
        "neuron_order": "dense" if neuron_order is None else digest_of(orders),
        "adaln_calibration": "random" if temb_nD is None else digest_of({"temb": temb_nD}),
        "lora": None if reader.lora is None else reader.lora.digest,
        "keep_adaln": keep_adaln,
        "seed": seed,
        "files": {
            name: [s.name for t in tasks for s in t.outputs] for name, tasks in files.items()
        },
    }
    index = {name: [s for t in tasks for s in t.outputs] for name, tasks in files.items()}
    if keep_adaln:
        files[DENSE_ADALN] = [reader.task(name) for name in adaln_names(dense)]

    def prepare(folder: Path) -> None:
        if compress:
            box["basis"], box["samples"] = adaln_basis(
                folder, reader, dense, temb_nD, structure.adaln_dim, seed
            )

    def finish(folder: Path) -> None:
        student.save_config(folder)
        if len(index) > 1:
            write_index(folder, index)
        write_json(folder / RECORD, result)

    job = Job(files, record, prepare, finish, report=box.setdefault("errors", {}))
    result = {**record, "adaln_error": job.report}
    run_job(job, target, progress)
    return result


def _is_hyper(config: Any) -> bool:
    return isinstance(config, str) and config.startswith("hyper-")


def default_lora_scale(config: Any, scale: float | None) -> float:
    """The given scale, or 1, or for "hyper-..." the 0.125 that Hyper-SD's LoRA is made for."""
    if scale is not None:
        return scale
    return 0.125 if _is_hyper(config) else 1.0


def meta_student(dense: nn.Module, structure: FluxMoEConfig) -> FluxMoETransformer2DModel:
    with torch.device("meta"):
        return FluxMoETransformer2DModel(**model_arguments(dense, structure))


def adaln_names(model: nn.Module) -> list[str]:
    return [f"{name}.{part}" for name in adaln_linears(model) for part in ("weight", "bias")]


def _student_tasks(reader, student, orders, seed: int, box: dict[str, Any]) -> list[Task]:
    """Every tensor of the student, small new ones first, then in the source's order."""
    ours = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    narrow = set(adaln_linears(student)) if student.d2m_config.adaln_dim is not None else set()
    changes = permutations(orders, ours)
    tasks = []
    for name, shape in ours.items():
        if name.endswith("neuron_order"):
            order_F = orders.get(name.removesuffix(".neuron_order"), torch.arange(shape[0]))
            made = partial(_constant, order_F.to(torch.int32))
            tasks.append(Task((TensorSpec(name, torch.int32, shape),), make=made))
        elif "router" in name:
            made = partial(_router, name, shape, seed)
            tasks.append(Task((TensorSpec(name, torch.float32, shape),), make=made))
    if narrow:
        down = [TensorSpec(f"adaln_down.{p}", reader.dtype, ours[f"adaln_down.{p}"])
                for p in ("weight", "bias")]  # fmt: skip

        def down_projection(_: list[Tensor]) -> list[Tensor]:
            return [t.to(reader.dtype) for t in box["basis"].down_projection()]

        tasks.append(Task(tuple(down), make=down_projection))
    for name in sorted(reader.source.tensors, key=reader.source.place):
        linear, _, part = name.rpartition(".")
        if linear in narrow:
            if part == "weight":
                tasks.append(_narrow_task(reader, linear, ours, box))
        else:
            tasks.append(reader.task(name, changes.get(name, same)))
    return tasks


def _narrow_task(reader: DenseReader, linear: str, ours, box: dict[str, Any]) -> Task:
    names = (f"{linear}.weight", f"{linear}.bias")

    def make(tensors: list[Tensor]) -> list[Tensor]:
        weight, bias = (reader.finish(n, t) for n, t in zip(names, tensors, strict=True))
        basis: AdaLNBasis = box["basis"]
        *made, box["errors"][linear] = basis.compress_measured(weight, bias, box["samples"])
        return made

    specs = tuple(TensorSpec(n, reader.dtype, ours[n]) for n in names)
    return Task(specs, tuple(reader.source.tensors[n] for n in names), make)


def _constant(tensor: Tensor, _: list[Tensor]) -> list[Tensor]:
    return [tensor]


def _router(name: str, shape: tuple[int, ...], seed: int, _: list[Tensor]) -> list[Tensor]:
    """N(0, 0.02) from a stream of its own, so that a resumed run draws the same."""
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(own)
    return [torch.empty(shape).normal_(std=ROUTER_STD, generator=generator)]
