"""Models as one file in Black Forest Labs' layout, and such files as folders; tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2m_models.checkpoints.bfl import CONFIG, HISTORY, LAST_ADALN, bfl_names, swap_halves
from d2m_models.checkpoints.jobs import Job, run_job
from d2m_models.checkpoints.restore import RECORD
from d2m_models.checkpoints.source import (
    Source,
    check_dense_source,
    check_dtypes,
    check_moe_source,
    open_source,
)
from d2m_models.checkpoints.tasks import (
    FILE_BYTES,
    Task,
    describe,
    made_tensors,
    plan_files,
    progress_bar,
    specs_of,
)
from d2m_models.checkpoints.tensor_files import TensorSpec, read_metadata, write_file
from d2m_models.files import Refused, check_new, write_atomic, write_text
from d2m_models.flux import FluxMoETransformer2DModel, warn_of_state


def export(source: str | Path, target: str | Path, form: str, progress: bool = True) -> None:
    """Writes a dense or converted FLUX in another form; every value stays as it is.

    Args:
        source: folder, hub id or single file; see `open_source`.
        target: a new file for "bfl", a new folder for "diffusers".
        form: "bfl", Black Forest Labs' tensors in one safetensors file, with routers and neuron
            orders under their own names and the configuration in its metadata; or "diffusers".

    Raises:
        ValueError: the source is no complete FLUX, or the target is there already.
    """
    target = Path(target).expanduser()
    if form == "bfl":
        if target.suffix != ".safetensors":
            raise ValueError(f"{target} is no name for a single file; expected NAME.safetensors")
        if target.exists():
            raise Refused(f"{target} already exists; choose another name or remove it")
    else:
        check_new(target)
    opened = open_source(source)
    model = meta_model(opened)
    check_dtypes(opened, None)
    if form == "bfl":
        _write_file(opened, model, target, progress)
    else:
        _write_folder(opened, model, target, progress)


def load_single_file(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense or converted model of a single file, in eval mode; routers stay fp32."""
    opened = open_source(path)
    check_dtypes(opened, dtype)
    model = meta_model(opened)
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    state = {}
    for name, stored in opened.tensors.items():
        tensor = stored.read()
        if dtype is not None and tensor.is_floating_point() and not any(k in name for k in kept):
            tensor = tensor.to(dtype)
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    if isinstance(model, FluxMoETransformer2DModel):
        warn_of_state(path, model)
    return model.eval()


def meta_model(opened: Source) -> Any:
    """The dense or converted model of a source, whichever it says it is, on the meta device."""
    converted = opened.config.get("_class_name") == FluxMoETransformer2DModel.__name__
    return (check_moe_source if converted else check_dense_source)(opened)


def _write_file(opened: Source, model: Any, target: Path, progress: bool) -> None:
    rest = dict(opened.tensors)
    tasks = []
    depths = len(model.transformer_blocks), len(model.single_transformer_blocks)
    for theirs, ours in bfl_names(*depths).items():
        if ours[0] not in rest:
            continue  # guidance
        parts = [rest.pop(name) for name in ours]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        swap = ours[0].startswith(LAST_ADALN)
        tasks.append(
            Task(
                (TensorSpec(theirs, parts[0].dtype, shape),),
                tuple(parts),
                (lambda read: [swap_halves(read[0])]) if swap else (lambda read: [torch.cat(read)]),
            )
        )
    tasks += [_copy(name, opened) for name in rest]
    # 4-byte tensors first: each then starts at a multiple of its item size.
    tasks.sort(key=lambda t: (-t.outputs[0].dtype.itemsize, opened.place(t.sources[0].name)))
    metadata = {CONFIG: json.dumps({"_class_name": type(model).__name__, **model.config})}
    history = _history(opened)
    if history is not None:
        metadata[HISTORY] = history
    with progress_bar(sum(task.nbytes for task in tasks), 0, progress) as advance:
        made = made_tensors(tasks, advance)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, lambda tmp: write_file(tmp, specs_of(tasks), made, metadata))


def _write_folder(opened: Source, model: Any, target: Path, progress: bool) -> None:
    names = sorted(opened.tensors, key=opened.place)
    files = plan_files([_copy(name, opened) for name in names], FILE_BYTES)
    history = _history(opened)

    def finish(folder: Path) -> None:
        describe(folder, model, files)
        if history is not None:
            write_text(folder / RECORD, history)

    settings = {"export": opened.digest(), "files": sorted(files)}
    run_job(Job(files, settings, finish=finish), target, progress)


def _copy(name: str, opened: Source) -> Task:
    stored = opened.tensors[name]
    return Task((TensorSpec(name, stored.dtype, stored.shape),), (stored,))


def _history(opened: Source) -> str | None:
    """The record of the conversion, which says whether outputs were refitted."""
    if opened.folder.is_file():
        return read_metadata(opened.folder).get(HISTORY)
    record = opened.folder / RECORD
    return record.read_text(encoding="utf-8") if record.is_file() else None
