"""The way back on disk: a converted checkpoint as the dense FLUX it was made of."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from d2m_models.checkpoints.jobs import Job, check_target, run_job
from d2m_models.checkpoints.reading import SHARD_BYTES, DenseReader, permutations, plan_files, same
from d2m_models.checkpoints.source import Source, check_dtypes, check_moe_source, open_source
from d2m_models.checkpoints.tensor_files import read_header, write_index
from d2m_models.conversion.flux import model_arguments
from d2m_models.partition import inverse_order
from d2m_models.topk import moe_layers

DENSE_ADALN = "adaln_dense.safetensors"


def checkpoint_to_dense(
    source: str | Path,
    target: str | Path,
    *,
    adaln: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes the dense FLUX again, bit for bit if nothing was trained.

    Args:
        source: folder of a converted model.
        adaln: adaln_dense.safetensors, where the source has a compressed AdaLN and was not
            converted with `keep_adaln`.
    """
    target = Path(target).expanduser()
    check_target(target)
    opened = open_source(source)
    model = check_moe_source(opened)
    arguments = model_arguments(model)
    if arguments.pop("ff_dims", None):
        raise ValueError(f"{opened.folder} has pruned FFNs, which the dense class cannot hold")
    for name in ("moe", "dense_double_blocks", "dense_single_blocks", "mob", "adaln_dim"):
        arguments.pop(name)
    with torch.device("meta"):
        dense = FluxTransformer2DModel(**arguments)
    tensors = dict(opened.tensors)
    if model.d2m_config.adaln_dim is not None:
        side = opened.folder / DENSE_ADALN if adaln is None else Path(adaln).expanduser()
        if not side.is_file():
            raise ValueError(
                f"the AdaLN of {opened.folder} is compressed and {side} does not exist; convert "
                f"with --keep-adaln, or give --adaln FILE"
            )
        tensors.update(read_header(side)[0])
    wide = Source(opened.folder, opened.config, {n: tensors[n] for n in dense.state_dict()})
    reader = DenseReader(wide, check_dtypes(wide, dtype))
    orders = {
        name: inverse_order(opened.tensors[f"{name}.neuron_order"].read())
        for name in moe_layers(model)
    }
    changes = permutations(orders, {name: t.shape for name, t in wide.tensors.items()})
    names = sorted(wide.tensors, key=wide.place)
    tasks = [reader.task(name, changes.get(name, same)) for name in names]
    files = plan_files(tasks, shard_bytes)
    index = {name: [s for t in tasks for s in t.outputs] for name, tasks in files.items()}

    def finish(folder: Path) -> None:
        dense.save_config(folder)
        if len(index) > 1:
            write_index(folder, index)

    settings = {"to_dense": wide.digest(), "dtype": str(reader.dtype), "files": sorted(files)}
    run_job(Job(files, settings, finish=finish), target, progress)
