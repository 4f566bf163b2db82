"""The device a command runs on, and what else its numbers depend on."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from typing import Any

from distill.errors import UserError


def pick_device(name: str) -> str:
    """ "auto" or a device that this machine has."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise UserError(
            f"--device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return name


def one_thread() -> None:
    """One CPU thread, unless OMP_NUM_THREADS asks for more: digits models are too small for two."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def add_device(command: argparse.ArgumentParser) -> None:
    """The option --device."""
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there)"
    )


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(s.split(":", 1)[1].strip() for s in lines if s.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """What numbers depend on: versions, processor, threads, and the back-end that runs."""
    import torch

    from d2m_kernels import __version__, backends

    kind = torch.device(device).type
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "triton": version("triton"),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if kind == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "backend": backends.resolve(None, kind, torch.float32),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
