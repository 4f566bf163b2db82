"""Options, environment and the summary of the benchmarks."""

from __future__ import annotations

import os
import platform

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="small shapes and few rounds: under a minute"
    )


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(s.split(":")[1].strip() for s in lines if s.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def pytest_benchmark_update_machine_info(config, machine_info):
    import d2m_kernels

    cuda = torch.cuda.is_available()
    machine_info["d2m"] = {
        "version": d2m_kernels.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda,
    }


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in (session.benchmarks if session else []) if "shape" in b.extra_info]
    if not rows:
        return
    terminalreporter.section("d2m")
    for b in rows:
        info = b.extra_info
        line = f"{b.name:<44} {info['shape']:<42} {info['gflop_per_s']:>9.1f} GFLOP/s"
        line += f" {info['gbyte_per_s']:>8.2f} GB/s"
        terminalreporter.write_line(line)
        for name, ratio in info.get("ratio_to_dense", {}).items():
            low, high = info["ratio_quartiles"][name]
            terminalreporter.write_line(
                f"    {name:<22} {ratio:.3f} x dense  ({low:.3f}-{high:.3f})"
            )
        if "flop_limit" in info:
            terminalreporter.write_line(f"    {'FLOP limit':<22} {info['flop_limit']:.3f} x dense")
