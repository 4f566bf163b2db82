"""Counts beside the times: launches, host syncs, peak memory, tiles chosen, parts of a step."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from d2m_kernels.backends import cpu

# Operators whose result the host reads (or whose output's shape depends on data).
_SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "item")


class _Operators(TorchDispatchMode):
    """Every operator that reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def launches_and_syncs(function: Callable[[], object], device: torch.device) -> dict:
    """GPU: kernels launched and synchronising calls of one call, by the profiler and torch's own
    sync debugging, after a call to warm up. CPU: operators dispatched, and those of them that would
    stall a GPU."""
    if device.type == "cpu":
        with _Operators() as operators:
            function()
        views = {"view", "t", "transpose", "detach", "_unsafe_view", "slice", "select", "unbind"}
        return {
            "operators": sum(name not in views for name in operators.names),
            "host_syncs": sum(name in _SYNCING for name in operators.names),
        }
    function()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        function()
        torch.cuda.synchronize(device)
    kernels = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    with warnings.catch_warnings(record=True) as caught, _sync_warnings():
        warnings.simplefilter("always")
        function()
    syncs = [w for w in caught if "synchroniz" in str(w.message)]
    return {"launches": len(kernels), "host_syncs": len(syncs)}


@contextlib.contextmanager
def _sync_warnings():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes held at one time during a call beyond those held before it.

    On a CPU ours begins without the workspace that the call before has kept, which would count as
    nothing.
    """
    if device.type == "cuda":
        function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu.forget_workspace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    marks = [e for e in events if e.get("name") == "[memory]"]
    changes = [e["args"]["Bytes"] for e in sorted(marks, key=lambda e: e["ts"])]
    return max(accumulate(changes, initial=0)) if marks else None


def saved_bytes(forward: Callable[[], object], leaves: list[torch.Tensor]) -> int:
    """Bytes that a forward keeps for its backward beyond the leaves (inputs and weights)."""
    known = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}  # the storages themselves, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@contextlib.contextmanager
def tiles_chosen():
    """{stage: tile} that the Triton back-end picks while the context is open."""
    chosen: dict[str, str] = {}
    try:
        from d2m_kernels.backends.triton import configs
    except ImportError:  # no triton here
        yield chosen
        return
    select = configs.select

    def recording(stage, *args, **kwargs):
        config = select(stage, *args, **kwargs)
        chosen[stage] = config.name
        return config

    with patch.object(configs, "select", recording):
        yield chosen
