"""FLUX checkpoints converted on disk, tensor by tensor: nothing larger than a tensor is in memory.

Shapes: F neurons of an FFN, D width, A AdaLN input, n calibration samples.

`convert_checkpoint` writes what `convert_flux(...).save_pretrained` would, `checkpoint_to_dense`
what `to_dense(...)` would. Both resume after a kill, see `jobs`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_models.adaln import adaln_linears
from d2m_models.checkpoints.calibration import (
    AdaLNCompression,
    digest_of,
    load_calibration,
    load_orders,
    parts,
)
from d2m_models.checkpoints.jobs import Job, difference, run_job
from d2m_models.checkpoints.lora_file import read_lora
from d2m_models.checkpoints.origin import base_pipeline
from d2m_models.checkpoints.restore import DENSE_ADALN, RECORD
from d2m_models.checkpoints.source import check_dense_source, check_dtypes, open_source
from d2m_models.checkpoints.tasks import (
    FILE_BYTES,
    DenseReader,
    Task,
    describe,
    permutations,
    plan_files,
    specs_of,
)
from d2m_models.checkpoints.tensor_files import StoredTensor, TensorSpec
from d2m_models.config import FluxMoEConfig, MoEConfig
from d2m_models.conversion.flux import ffn_tensors, skeleton
from d2m_models.files import Refused, check_new, write_json
from d2m_models.moe import ROUTER_STD
from d2m_models.presets import resolve_config


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
    shard_bytes: int = FILE_BYTES,
    progress: bool = True,
) -> dict[str, Any]:
    """Converts a saved FLUX transformer into a folder for `from_pretrained`.

    Args:
        source, subfolder, variant: see `open_source`.
        target: folder that does not exist yet.
        config: as for `convert_flux`. "hyper-..." presets need a `lora`.
        neuron_order: {FFN name: order}, or a safetensors file or a folder of files with that and
            what `load_orders` says of routers and output weights; None keeps the dense order.
        adaln_calibration: temb samples [n, D], or a safetensors file with them as "temb".
        keep_adaln: also write the dense AdaLN tensors, which `checkpoint_to_dense` needs.
        lora, lora_scale: fused into the dense weights first; scale 1, for "hyper-..." 0.125.
        dtype: of the result, by default the source's; routers are fp32.
        seed: of the routers (and of the stand-in calibration).

    Returns:
        The record that is also written as d2m_conversion.json, with the AdaLN errors. Where
        `target` is this very conversion already, finished, nothing is written.
    """
    target = Path(target).expanduser()
    if not (target / RECORD).is_file():
        check_new(target)  # before anything that takes time
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
    student = skeleton(dense, structure)
    orders, start = load_orders(neuron_order, student)
    for name, value in (("keep_adaln", keep_adaln), ("adaln_calibration", adaln_calibration)):
        if structure.adaln_dim is None and value is not None and value is not False:
            raise ValueError(f"{name} is for a compressed AdaLN, this configuration has none")
    adaln = None
    if structure.adaln_dim is not None:
        temb_nD = load_calibration(adaln_calibration, dense.inner_dim)
        adaln = AdaLNCompression(reader, dense, temb_nD, structure.adaln_dim, seed)

    files = plan_files(_student_tasks(reader, student, orders, start, seed, adaln), shard_bytes)
    routers = {name: t.read() for name, t in start.items() if name.endswith(".router")}
    record = {
        "source": {"tensors": opened.digest(), "dtype": str(out_dtype)},
        "structure": structure.to_dict(),
        "neuron_order": "dense" if neuron_order is None else digest_of(orders | routers),
        "routers": "fitted" if routers else "random",
        "outputs": "refitted" if any(name.endswith(".w2") for name in start) else "dense",
        "adaln_calibration": "random" if adaln is None else adaln.origin,
        "lora": None if reader.lora is None else reader.lora.digest,
        "keep_adaln": keep_adaln,
        "seed": seed,
        "files": {name: [spec.name for spec in specs_of(tasks)] for name, tasks in files.items()},
    }
    if (target / RECORD).is_file():
        return _finished(target, record)
    report = {} if adaln is None else adaln.errors
    everything = dict(files)
    if keep_adaln:
        names = [name for linear in adaln_linears(dense) for name in parts(linear)]
        everything[DENSE_ADALN] = [reader.task(name) for name in names]

    origin = {"state": "converted", "base": base_pipeline(source, subfolder)}
    if isinstance(config, str):
        origin["preset"] = config

    def finish(folder: Path) -> None:
        student.register_to_config(origin=origin)
        describe(folder, student, files)
        write_json(folder / RECORD, {**record, "adaln_error": report})

    prepare = {} if adaln is None else {"prepare": adaln.prepare}
    run_job(Job(everything, record, finish=finish, report=report, **prepare), target, progress)
    return {**record, "adaln_error": report}


def _finished(target: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a conversion that is there already, if it is this one."""
    found = json.loads((target / RECORD).read_text(encoding="utf-8"))
    own = {key: value for key, value in found.items() if key != "adaln_error"}
    if own != json.loads(json.dumps(record)):
        raise Refused(
            f"{target} holds another conversion ({difference(own, record)}); choose another folder "
            "or remove it"
        )
    return found


def _is_hyper(config: Any) -> bool:
    return isinstance(config, str) and config.startswith("hyper-")


def default_lora_scale(config: Any, scale: float | None) -> float:
    """The given scale, or 1, or for "hyper-..." the 0.125 that Hyper-SD's LoRA is made for."""
    if scale is not None:
        return scale
    return 0.125 if _is_hyper(config) else 1.0


def _student_tasks(
    reader, student, orders, start, seed: int, adaln: AdaLNCompression | None
) -> list[Task]:
    """Every tensor of the student, small new ones first, then in the source's order."""
    ours = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    narrow = set() if adaln is None else set(adaln_linears(student))
    changes = permutations(orders, ours)
    for name in orders:
        if f"{name}.w2" in start:
            down = ffn_tensors(name)[2][0]
            changes[down] = partial(_last_columns, start[f"{name}.w2"])
            changes[down.replace(".weight", ".bias")] = partial(_plus, start[f"{name}.b2"])

    def specs(*names: str, dtype: torch.dtype = reader.dtype) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, dtype, ours[name]) for name in names)

    tasks = []
    for name, shape in ours.items():
        if name.endswith("neuron_order"):
            order_F = orders.get(name.removesuffix(".neuron_order"), torch.arange(shape[0]))
            tasks.append(
                Task(specs(name, dtype=torch.int32), make=lambda _, o=order_F: [o.to(torch.int32)])
            )
        elif name.removesuffix(".weight") in start:
            stored = (start[name.removesuffix(".weight")],)
            tasks.append(Task(specs(name, dtype=torch.float32), stored))
        elif "router" in name:
            made = partial(_router, name, shape, seed)
            tasks.append(Task(specs(name, dtype=torch.float32), make=made))
    if adaln is not None:
        tasks.append(Task(specs(*parts("adaln_down")), make=adaln.down_projection))
    for name in sorted(reader.source.tensors, key=reader.source.place):
        linear, _, part = name.rpartition(".")
        if linear not in narrow:
            tasks.append(reader.task(name, changes.get(name)))
        elif part == "weight":
            sources = tuple(reader.source.tensors[n] for n in parts(linear))
            tasks.append(Task(specs(*parts(linear)), sources, partial(adaln.compress, linear)))
    return tasks


def _last_columns(stored: StoredTensor, dense: Tensor) -> Tensor:
    """The dense tensor with its last columns (all but a proj_out's attention) replaced."""
    new = stored.read().to(dense.dtype)
    return torch.cat([dense[:, : -new.shape[1]], new], dim=1)


def _plus(stored: StoredTensor, dense: Tensor) -> Tensor:
    return (dense.float() + stored.read()).to(dense.dtype)


def _router(name: str, shape: tuple[int, ...], seed: int, _: list[Tensor]) -> list[Tensor]:
    """N(0, 0.02) from a stream of its own, so that a resumed run draws the same."""
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(own)
    return [torch.empty(shape).normal_(std=ROUTER_STD, generator=generator)]
