"""Checkpoints of a run: folders `step-0000123`, each complete or not there at all.

    .step-0000123.tmp/   written by all ranks (torch.distributed.checkpoint, safetensors files),
                         flushed to disk, then
    step-0000123/        renamed, then
    latest               says so, then older folders beyond `keep` are removed, oldest first.

Killed anywhere in between, the newest folder without a dot is complete. Tensors are stored with
their place in the whole, so another number of ranks reads them too. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from d2m_models.files import clear_temporary, publish
from distill import files as ckpt
from distill.errors import CheckpointError, UserError
from distill.loop.parallel import World

FORMAT = "dense2moe-2"
_NAME = re.compile(r"step-(\d{7,})")


def complete(folder: Path | str) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first."""
    folder = Path(folder)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def newest(folder: Path | str) -> Path | None:
    """The checkpoint to go on from."""
    return found[-1] if (found := complete(folder)) else None


def read_meta(path: Path) -> dict[str, Any]:
    """What `Snapshots.save` was told beside the tensors."""
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"checkpoint {path} is damaged: {err}; {_instead(path)}") from err
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {meta.get('format')!r}; this version reads {FORMAT!r}"
        )
    return meta


def _instead(path: Path) -> str:
    older = [p.name for p in complete(path.parent) if p != path]
    return f"remove it to go on from {older[-1] if older else 'the beginning'}"


def load(path: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill the given tensors (whole or sharded in any way) in place, and this rank's RNG."""
    try:
        reader = HuggingFaceStorageReader(str(path / "tensors"))
        have = reader.read_metadata().state_dict_metadata
        found = {name: entry.size for name, entry in have.items()}
        ckpt.check_fit({name: t.shape for name, t in tensors.items()}, found, path)
        _quiet()
        dcp.load(dict(tensors), storage_reader=reader, no_dist=world.size == 1)
    except (SafetensorError, OSError, CheckpointException) as err:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({' '.join(str(err).split())[:300]}); {_instead(path)}"
        ) from err
    rng = path / f"rng-{world.rank:05d}.safetensors"
    if rng.exists():  # more ranks than before: a new one keeps the streams it started with
        ckpt.set_rng_state(ckpt.load_tensors(rng)[0])


class Snapshots:
    """Writes and purges the checkpoints of one run.

    Args:
        folder: of the run. keep: how many complete ones stay. wait: False returns from `save` once
            tensors are copied to host memory; they are written beside the next steps, and become
            a checkpoint at the next call of `settle`, which waits if `writing` on any rank.
    """

    def __init__(self, folder: Path, world: World, keep: int = 2, wait: bool = True):
        self.folder, self.world, self.keep, self.wait = folder, world, keep, wait
        self.pending: tuple[int, Any] | None = None
        # the writing threads talk to each other beside the steps, so not in the steps' group
        alone = wait or world.size == 1
        self.group = None if alone else torch.distributed.new_group(backend="gloo")
        if world.main:  # what a killed process left half-written
            clear_temporary(folder)
        world.barrier()

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write a checkpoint; on failure the older ones remain and nothing half-written does."""
        self.settle()
        _quiet()
        tmp = self.folder / f".step-{step:07d}.tmp"
        writer = HuggingFaceStorageWriter(str(tmp / "tensors"), save_distributed=True)
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        alone = self.world.size == 1

        def make_folder() -> None:
            if self.world.main:
                (tmp / "tensors").mkdir(parents=True)
                text = json.dumps({**meta, "step": step, "format": FORMAT})
                (tmp / "state.json").write_text(text, encoding="utf-8")

        def write_rng() -> None:
            ckpt.save_tensors(tmp / f"rng-{self.world.rank:05d}.safetensors", ckpt.rng_state())

        try:
            self._together(step, make_folder)
            self._together(step, write_rng)
            if self.wait:
                dcp.save(state, storage_writer=writer, no_dist=alone)
                self._publish(step)
            else:
                job = dcp.async_save(
                    state, storage_writer=writer, no_dist=alone, process_group=self.group
                )
                self.pending = (step, job)
        except CheckpointException as err:
            raise self._failed(step, err) from err
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise

    def _together(self, step: int, work: Callable[[], None]) -> None:
        """Do `work` on every rank; where it fails on one, all give up the save at once."""
        failure: Exception | None = None
        try:
            work()
        except (UserError, OSError) as err:
            failure = err
        if any(self.world.anywhere(failure is not None)):
            reason = failure or UserError("another process could not write its part")
            raise self._failed(step, reason) from failure

    def writing(self) -> bool:
        """Whether this rank still writes a checkpoint beside the steps."""
        return self.pending is not None and not self.pending[1].done()

    def settle(self) -> None:
        """Wait for the save under way, if any, and make it a checkpoint."""
        if self.pending is not None:
            (step, job), self.pending = self.pending, None
            try:
                job.result()
            except (Exception, CheckpointException) as err:  # whatever the writing thread met
                raise self._failed(step, err) from err
            self._publish(step)

    def _failed(self, step: int, err: BaseException) -> UserError:
        shutil.rmtree(self.folder / f".step-{step:07d}.tmp", ignore_errors=True)
        old = newest(self.folder)
        rest = f"{old.name} remains" if old else "there is no older one"
        return UserError(
            f"cannot write the checkpoint of step {step} into {self.folder}: {_reason(err)}; {rest}"
        )

    def _publish(self, step: int) -> None:
        """Flush, rename, point, purge; in this order."""
        self.world.barrier()  # every rank has written
        tmp, path = self.folder / f".step-{step:07d}.tmp", self.folder / f"step-{step:07d}"

        def rename() -> None:
            if not self.world.main:
                return
            if path.exists():  # a run that was put back before this step
                remove(path)
            publish(tmp, path)
            ckpt.write_text(self.folder / "latest", f"{path.name}\n")
            for old in complete(self.folder)[: -self.keep]:
                remove(old)

        self._together(step, rename)

    def clear(self) -> None:
        """Remove all checkpoints: the run is finished and its result is kept elsewhere."""
        self.settle()
        if self.world.main:
            clear(self.folder)
        self.world.barrier()


def remove(path: Path) -> None:
    """Rename, then delete: a checkpoint in the middle of being deleted is none."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    with suppress(OSError):
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def clear(folder: Path) -> None:
    """Remove all checkpoints of a finished run, and what a killed process left of them."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in complete(folder):
        remove(path)
    (folder / "latest").unlink(missing_ok=True)


def adopt(folder: Path, run_id: str) -> None:
    """All checkpoints of the folder belong to this run from now on; nothing else of them changes.

    Its settings were changed and that was accepted: the next start must not be refused.
    """
    for path in complete(folder):
        with suppress(CheckpointError):  # one that is damaged stays as it is
            meta = {**read_meta(path), "run": run_id}
            ckpt.write_text(path / "state.json", json.dumps(meta))


def _quiet() -> None:
    """No warning that one process saves alone, which an asynchronous save's thread gives too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _reason(err: BaseException) -> str:
    """The first cause, of an exception that may stand for those of several ranks."""
    failures = getattr(err, "failures", None)
    if failures:
        err = next(iter(failures.values()))[0]
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    return " ".join(str(err).split())[:300]
