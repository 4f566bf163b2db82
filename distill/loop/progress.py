"""What a run tells: log.jsonl always, experts.jsonl, TensorBoard and wandb if asked for."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files as ckpt
from distill.errors import UserError


class Log:
    """JSON lines, one a logging interval; on resume, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [json.dumps(line) for line in read_log(path) if line["step"] <= step]
            ckpt.write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, entry: dict[str, Any]) -> None:
        with ckpt.user_errors(f"write {self.path}"):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """All complete lines of a log; a last line cut short by a crash is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class Trackers:
    """TensorBoard and wandb, whichever of them are named; each gets every number of the log."""

    def __init__(self, names: Sequence[str], folder: Path, label: str):
        self.label = label
        self.board = self.run = None
        for name in names:
            try:
                if name == "tensorboard":
                    from torch.utils.tensorboard import SummaryWriter

                    self.board = SummaryWriter(str(folder / "tensorboard"))
                else:
                    import wandb

                    # a resumed run goes on in the same curve
                    same = ckpt.fingerprint(str(folder.resolve()))
                    self.run = wandb.init(dir=str(folder), name=label, id=same, resume="allow")
            except ImportError as err:
                raise UserError(
                    f"train.loggers has {name!r}, but the package is missing: pip install {name}, "
                    "or take it out; log.jsonl is written in any case"
                ) from err

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in entry.items() if k != "step" and isinstance(v, (int, float))}
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(f"{self.label}/{key}", value, step)
        if self.run is not None:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()


class Utilisation:
    """How evenly experts (or blocks of a group) are used, over one logging interval.

    1 is even: load / ideal, where ideal = slots / experts of the layer.
    """

    def __init__(self) -> None:
        self.loads: dict[str, Tensor] = {}
        self.called_out: set[tuple[str, int]] = set()

    def add(self, loads: Mapping[str, Tensor]) -> None:
        for name, load in loads.items():
            now = load.detach().double()
            self.loads[name] = self.loads[name] + now if name in self.loads else now

    def take(self) -> dict[str, list[float]]:
        """Layer -> load/ideal of each expert since the last call."""
        table = {}
        for name, load in self.loads.items():
            total = load.sum().clamp(min=1)
            table[name] = [round(v, 4) for v in (load * len(load) / total).tolist()]
        self.loads = {}
        return table

    def dead(self, table: Mapping[str, Sequence[float]]) -> list[str]:
        """Experts that nobody chose in the interval, each named once in a run."""
        found = []
        for name, values in table.items():
            for expert, value in enumerate(values):
                if value == 0 and (name, expert) not in self.called_out:
                    self.called_out.add((name, expert))
                    found.append(f"{name}: expert {expert}")
        return found


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held: GPU memory by torch's allocator, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Report:
    """Means over a logging interval, on their way to the logs and the progress bar."""

    def __init__(self, loop: Any):
        self.loop = loop
        self.utilisation = Utilisation()
        self.sums: dict[str, Tensor] = {}
        self.count, self.first, self.since, self.rate = 0, 0, 0.0, 0.0

    def state(self) -> dict[str, Any]:
        """The interval so far, for a checkpoint in the middle of it."""
        return {
            "sums": {k: float(v) for k, v in self.sums.items()},
            "wide": [k for k, v in self.sums.items() if v.dtype == torch.float64],
            "loads": {k: v.tolist() for k, v in self.utilisation.loads.items()},
            "count": self.count,
        }

    def load(self, state: dict[str, Any]) -> None:
        device, wide = self.loop.world.device, torch.float64
        self.sums = {
            k: torch.tensor(v, device=device, dtype=wide if k in state.get("wide", ()) else None)
            for k, v in state["sums"].items()
        }
        loads = state["loads"].items()
        self.utilisation.loads = {k: torch.tensor(v, device=device, dtype=wide) for k, v in loads}
        self.count = state["count"]

    def open(self) -> None:
        loop = self.loop
        self.first, self.since = loop.step, time.perf_counter()
        if loop.world.main:
            self.log = Log(loop.folder / "log.jsonl", loop.step)
            self.experts = Log(loop.folder / "experts.jsonl", loop.step)
            self.trackers = Trackers(loop.config.loggers, loop.folder, loop.label)

    def add(self, parts: dict[str, Tensor], loads: dict[str, Tensor], rate: float) -> None:
        for key, value in parts.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.utilisation.add(loads)
        self.count, self.rate = self.count + 1, rate

    def write(self) -> dict[str, str]:
        """One line for the steps since the last one; returns what the bar shows."""
        loop, now = self.loop, time.perf_counter()
        means = {k: float(v) / self.count for k, v in self.sums.items()}
        table = self.utilisation.take()
        samples = (loop.step - self.first) * loop.config.batch_size
        entry = {"step": loop.step, **means, "lr": self.rate}
        if table:
            entry["expert_min"] = min(map(min, table.values()))
            entry["expert_max"] = max(map(max, table.values()))
        if loop.skipped:
            entry["skipped"] = loop.skipped
        # how many shards any rank has found damaged and passes over
        found = getattr(loop.objective, "skipped_shards", lambda: None)()
        if found is not None and (bad_shards := int(loop.world.sum(found).count_nonzero())):
            entry["bad_shards"] = bad_shards
        entry["samples_per_second"] = samples / (now - self.since)
        entry["peak_memory_gib"] = round(peak_memory_gib(loop.world.device), 3)
        if loop.world.main:
            self.log.write(entry)
            if table:
                self.experts.write({"step": loop.step, "load": table})
            self.trackers.write(loop.step, entry)
            if dead := self.utilisation.dead(table):
                more = f" and {len(dead) - 8} more" if len(dead) > 8 else ""
                self.say(
                    f"{loop.label}: chosen by nobody since step {self.first}: "
                    f"{', '.join(dead[:8])}{more}"
                )
        self.sums, self.count, self.first, self.since = {}, 0, loop.step, now
        return {"loss": f"{means['loss']:.4g}"} if means else {}

    def say(self, text: str) -> None:
        if self.loop.world.main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.loop.world.main:
            self.trackers.close()
