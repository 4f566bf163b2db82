"""Where a step's time goes: attention, FFN, other large GEMMs, AdaLN, rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Operator -> which argument is the left matrix.
_GEMMS = {"aten::addmm": 1, "aten::_addmm_activation": 1, "aten::mm": 0, "aten::bmm": 0,
          "aten::linear": 0, "aten::mkldnn_linear": 0}  # fmt: skip


def split(
    function: Callable[[], object], seconds: float, device: torch.device, dim: int, rows: int = 4
) -> dict[str, float]:
    """Parts of a dense FLUX step or block that takes `seconds`, by a profile of one call.

    A product is FFN where one side is F = 4 D; where it is D + F (a single block's proj_out) it
    counts by columns. At most `rows` rows is AdaLN or conditioning. What no product or attention
    accounts for is rest, launch gaps included; GELU belongs to the FFN.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    function()
    with profile(activities=activities, record_shapes=True) as prof:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = dict.fromkeys(("attention", "ffn", "gemm", "adaln"), 0.0)
    total = 0.0
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            # Kernels of torch.compile belong to no operator; their names say what was fused.
            if event.name.startswith("triton_") and "gelu" in event.name:
                found["ffn"] += event.self_device_time_total
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        total += own
        for part, share in _parts_of(event.name, event.input_shapes, dim, rows).items():
            found[part] += own * share
    # A GPU's kernels are timed exactly; a CPU's profile is slower than the step, so scale it.
    scale = 1e-6 if device.type == "cuda" else seconds / total
    result = {part: us * scale for part, us in found.items()}
    result["rest"] = max(0.0, seconds - sum(result.values()))
    return result


def _parts_of(name: str, shapes, dim: int, rows: int) -> dict[str, float]:
    """{part: share} of one operator's own time."""
    if "attention" in name:
        return {"attention": 1.0}
    if name == "aten::gelu":
        return {"ffn": 1.0}
    if name not in _GEMMS or not shapes:
        return {}
    # addmm(bias, left, right, ...), mm(left, right, ...); an out= variant lists its output last
    first = _GEMMS[name]
    left, right = shapes[first : first + 2]
    if len(left) < 2 or len(right) < 2:
        return {}
    if left[-2] <= rows:
        return {"adaln": 1.0}
    sides = {left[-1], *right[-2:]}
    if 4 * dim in sides:
        return {"ffn": 1.0}
    if 5 * dim in sides:
        return {"ffn": 0.8, "gemm": 0.2}
    return {"gemm": 1.0}
