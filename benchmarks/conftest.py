"""Options, the `bench` fixture that measures and records, and the summary."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from harness import ceilings, counting
from harness import environment as env
from harness.race import Race, race, replay
from harness.results import Results

from d2m_kernels import backends

SIZES = ("tiny", "quick", "default", "full")


def pytest_addoption(parser):
    group = parser.getgroup("d2m", "dense2moe benchmarks")
    group.addoption("--quick", action="store_true", help="small shapes, few rounds: under a minute")
    group.addoption("--full", action="store_true", help="every shape; ten minutes on two cores")
    group.addoption("--tiny", action="store_true", help="rehearsal: the numbers mean nothing")
    group.addoption("--results", metavar="PATH", help="JSON file, or folder for <device>.json")
    group.addoption("--deadline", type=float, metavar="S", help="start nothing after S seconds")
    group.addoption("--attention", help="diffusers attention back-end of the whole models")
    group.addoption("--on", default=None, metavar="DEVICE", help="cpu, cuda, ... (default: best)")


def _size(config) -> str:
    chosen = [s for s in ("tiny", "quick", "full") if config.getoption(f"--{s}")]
    if len(chosen) > 1:
        raise pytest.UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    return chosen[0] if chosen else "default"


def pytest_configure(config):
    config._d2m_start = time.monotonic()
    config._d2m_lines, config._d2m_models = [], {}


class Session:
    """Device, size, results file and ceilings of this run."""

    def __init__(self, config):
        name = config.getoption("--on") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.size = _size(config)
        self.environment = env.environment(self.device) | {"size": self.size}
        self.ceilings = ceilings.measure(self.device, self.size)
        if self.device.type == "cuda":
            self.environment |= env.gpu_state(self.device.index or 0)  # clocks under load, not idle
        path = config.getoption("--results")
        if path is not None:
            path = Path(path)
            path = path if path.suffix == ".json" else path / f"{env.slug(self.device)}.json"
        self.results = Results(path, self.environment)
        self.results.set_ceilings(self.ceilings)
        self.attention = config.getoption("--attention")
        self.lines, self.models = config._d2m_lines, config._d2m_models


@pytest.fixture(scope="session")
def session(request) -> Session:
    return Session(request.config)


class Bench:
    """One test's measurement: race the contenders, count, record, show."""

    def __init__(self, benchmark, session: Session, node: str):
        self.benchmark, self.session, self.node = benchmark, session, node
        self.device, self.size, self.results = session.device, session.size, session.results

    def rounds(self, default: int, quick: int = 5) -> int:
        return {"tiny": 1, "quick": quick}.get(self.size, default)

    def seconds(self, on_cpu: float, else_: float) -> float:
        """A time budget: the default set on a CPU is to stay short."""
        return on_cpu if self.device.type == "cpu" and self.size == "default" else else_

    def race(self, contenders, ours: str | None, rounds: int, budget: float | None = None) -> Race:
        """Interleaved timing; pytest-benchmark shows the contender `ours`."""
        result = race(contenders, rounds, self.device, budget)
        if ours is not None:
            self.show(result, ours)
        return result

    def show(self, result: Race, ours: str) -> None:
        """Once a test: hands the rounds of `ours` to pytest-benchmark."""
        replay(self.benchmark, result.times[ours])

    def count(self, function) -> dict:
        """Launches, syncs, peak memory and the tiles chosen of one call."""
        with counting.tiles_chosen() as tiles:
            counts = counting.launches_and_syncs(function, self.device)
        counts["peak_bytes"] = counting.peak_bytes(function, self.device)
        return counts | ({"config": tiles} if tiles else {})

    def against_ceilings(self, seconds: float, gflop: float, gbyte: float) -> dict:
        """Rates, shares of the measured ceilings, and of the floor that they allow."""
        top = self.session.ceilings
        compute, traffic = gflop * 1e-3 / top["tflops"], gbyte / top["gbps"]
        floor = max(compute, traffic)
        return {
            "gflop": gflop,
            "gbyte": gbyte,
            "tflops": gflop * 1e-3 / seconds,
            "gbps": gbyte / seconds,
            "share_of_ceiling": {"tflops": compute / seconds, "gbps": traffic / seconds},
            "floor_seconds": floor,
            "share_of_floor": floor / seconds,
        }

    def backend(self, dtype: torch.dtype = torch.bfloat16) -> str:
        """What runs the layer here."""
        return backends.resolve(None, self.device.type, dtype)

    def add(self, section: str, record_id: str, record: dict, line: str | None = None) -> None:
        record = rounded(record)
        self.results.add(section, record_id, record)
        self.benchmark.extra_info.update({k: v for k, v in record.items() if k != "seconds"})
        if line:
            self.session.lines.append(line)

    def model(self, name: str, record: dict) -> None:
        """An entry of "models", and its line of the summary; a later one replaces both."""
        self.results.set("models", name, rounded(record))
        if not {"latency_over_flops", "latency_over_ideal"} <= record.keys():
            return
        self.session.models[name] = (
            f"{name:<12} {record['mode']:<9} {record['latency_ratio']:.3f} x dense, FLOPs "
            f"{record['flops_ratio']:.3f}, latency/FLOPs {record['latency_over_flops']:.3f}, "
            f"latency/ideal {record['latency_over_ideal']:.3f}"
        )

    def note(self, line: str) -> None:
        self.session.lines.append(line)


def rounded(value, digits: int = 5):
    """Floats at `digits` significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return value


@pytest.fixture
def bench(benchmark, session, request) -> Bench:
    limit = request.config.getoption("--deadline")
    result = Bench(benchmark, session, request.node.name)
    if limit is not None and time.monotonic() - request.config._d2m_start > limit:
        why = f"the deadline of {limit:g} s had passed"
        session.results.add("skipped", request.node.name, {"why": why})
        pytest.skip(why)
    return result


def pytest_benchmark_update_machine_info(config, machine_info):
    name = config.getoption("--on") or ("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["d2m"] = env.environment(torch.device(name))


def pytest_terminal_summary(terminalreporter, config):
    lines = [*config._d2m_lines, *config._d2m_models.values()]
    if lines:
        terminalreporter.section("dense2moe")
        for line in lines:
            terminalreporter.write_line(line)
