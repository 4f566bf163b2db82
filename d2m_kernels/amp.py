"""Autocast: which dtype it asks for, and how to leave it (logits stay fp32)."""

from __future__ import annotations

import contextlib

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast wants on this device, or None where it is off or unknown (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str):
    """A region in which ops keep the dtypes they are given; free where autocast is off anyway."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
