"""What a number depends on: device, driver, clocks, versions, commit, date, pins."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from distill.device import cpu_name, version

ROOT = Path(__file__).resolve().parents[2]
_SMI = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit, with "+" where tracked files of the packages differ from it.

    D2M_COMMIT stands in for it where the tree travels without its history.
    """
    given = os.environ.get("D2M_COMMIT")
    if given:
        return given
    head = _run("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    code = ("csrc", "d2m_kernels", "d2m_models", "distill", "benchmarks/*.py")
    changed = _run("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    return head + ("+" if changed else "")


def gpu_state(index: int = 0) -> dict:
    """Driver, clocks, power limit and temperature now, by nvidia-smi; empty without it."""
    fields = ",".join(_SMI.values())
    query = f"--query-gpu={fields}"
    text = _run("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={index}")
    if not text:
        return {}
    return dict(zip(_SMI, (part.strip() for part in text.splitlines()[0].split(",")), strict=True))


def environment(device: torch.device) -> dict:
    """Everything about this process that a reader of its numbers may ask for."""
    import d2m_kernels

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device_type": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": load,
        "python": platform.python_version(),
        "os": platform.platform(),
        "dense2moe": d2m_kernels.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "pins": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("D2M_", "TRITON_"))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "sms": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            **gpu_state(device.index or 0),
        }
    return record


def slug(device: torch.device) -> str:
    """Name of the results file: "cpu", "h200", "a100", "rtx-4090", ..."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    name = re.sub(r"nvidia|geforce|tesla|[-\s](sxm\d?|pcie|nvl|\d+gb\S*)\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
