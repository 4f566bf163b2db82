"""The device a command runs on."""

from __future__ import annotations

import argparse
import os

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
