"""The way back on disk: a converted checkpoint as the dense FLUX it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from d2m_models.checkpoints.jobs import Job, run_job
from d2m_models.checkpoints.source import Source, check_dtypes, check_moe_source, open_source
from d2m_models.checkpoints.tasks import FILE_BYTES, DenseReader, describe, permutations, plan_files
from d2m_models.checkpoints.tensor_files import read_header
from d2m_models.conversion.flux import dense_skeleton
from d2m_models.files import Refused, check_new
from d2m_models.partition import inverse_order
from d2m_models.topk import moe_layers

DENSE_ADALN = "adaln_dense.safetensors"


RECORD = "d2m_conversion.json"


def is_refitted(folder: Path) -> bool:
    """Whether a conversion has FFN outputs fitted by least squares in place of the dense ones."""
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_text()).get("outputs") == "refitted"


def checkpoint_to_dense(
    source: str | Path,
    target: str | Path,
    *,
    adaln: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = FILE_BYTES,
    progress: bool = True,
) -> None:
    """Writes the dense FLUX again, bit for bit if nothing was trained.

    Args:
        source: folder of a converted model.
        adaln: adaln_dense.safetensors, where the source has a compressed AdaLN and was not
            converted with `keep_adaln`.
    """
    target = Path(target).expanduser()
    if (target / "config.json").is_file():
        raise Refused(
            f"{target} holds a complete model already; choose another folder or remove it"
        )
    check_new(target)
    opened = open_source(source)
    if opened.folder.is_file():
        raise ValueError(
            f"{source} is a single file; make a folder of it first, and give --to-dense that: "
            f"d2m export {source} FOLDER --format diffusers"
        )
    model = check_moe_source(opened)
    if is_refitted(opened.folder):
        raise ValueError(
            f"the FFN outputs of {opened.folder} were refitted, the dense ones are not in it; take "
            "the model that it was converted from"
        )
    dense = dense_skeleton(model, str(opened.folder))
    tensors = dict(opened.tensors)
    if model.d2m_config.adaln_dim is not None:
        side = opened.folder / DENSE_ADALN if adaln is None else Path(adaln).expanduser()
        if not side.is_file():
            raise ValueError(
                f"the AdaLN of {opened.folder} is compressed and {side} does not exist; convert "
                f"with --keep-adaln, or give --adaln FILE"
            )
        tensors.update(read_header(side))
    wide = Source(opened.folder, opened.config, {n: tensors[n] for n in dense.state_dict()})
    reader = DenseReader(wide, check_dtypes(wide, dtype))
    orders = {
        name: inverse_order(opened.tensors[f"{name}.neuron_order"].read())
        for name in moe_layers(model)
    }
    changes = permutations(orders, {name: t.shape for name, t in wide.tensors.items()})
    tasks = [reader.task(name, changes.get(name)) for name in sorted(wide.tensors, key=wide.place)]
    files = plan_files(tasks, shard_bytes)
    settings = {"to_dense": wide.digest(), "dtype": str(reader.dtype), "files": sorted(files)}
    job = Job(files, settings, finish=lambda folder: describe(folder, dense, files))
    run_job(job, target, progress)
