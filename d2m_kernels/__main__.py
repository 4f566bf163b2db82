"""`python -m d2m_kernels`: versions, which back-ends are active, and why the others are not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from d2m_kernels import __version__, backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension(name: str) -> str:
    spec = importlib.util.find_spec(name)
    return "not built" if spec is None else str(spec.origin)


def _serves(device_type: str) -> list[str]:
    dtype = torch.bfloat16
    best = backends.resolve(None, device_type, dtype)
    lines = [f"{device_type} tensors, bf16 (in order of preference):"]
    for name, reason in backends.explain(device_type, dtype).items():
        state = ("used" if name == best else "available") if reason is None else f"no: {reason}"
        lines.append(f"  {name:<10} {state}")
    grouped = backends.groups_streams(best)
    lines.append(
        f"  two streams (moe_ffn_pair): {'one launch' if grouped else 'two calls'} a stage"
    )
    return lines


def report() -> str:
    """The text that `python -m d2m_kernels` prints."""
    gpu = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    lines = [
        f"d2m_kernels {__version__}",
        f"  python     {platform.python_version()}",
        f"  torch      {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"  triton     {_version('triton')}",
        f"  GPU        {gpu}",
        f"  _d2m_cpu   {_extension('_d2m_cpu')}",
        f"  _d2m_cuda  {_extension('_d2m_cuda')}",
        f"  {backends.ENV}={os.environ.get(backends.ENV, '')}  (pins the default back-end)",
    ]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device_type in devices:
        lines += ["", *_serves(device_type)]
    if not torch.cuda.is_available():
        lines += ["", "cuda tensors: torch.cuda.is_available() is False"]
        for name in ("triton", "cuda"):
            lines.append(f"  {name:<10} {backends.unavailable(name) or 'would run'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
