"""A planned call of the layer launches exactly what an unplanned one does.

Needs no GPU and compiles nothing: what reaches a compiled kernel is written down instead. That
happens in a process of its own (this file run as a script).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TMA = "64x64x64w4s4p2tma"
T, D, S, H, E, K = (96, 40), 64, 128, 64, 4, 2


def test_a_plan_repeats_the_launches():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "D2M_TRITON_PLANS")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "D2M_TRITON_CONFIG": TMA}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


class Compiled:
    """In place of a compiled kernel: writes down its launches."""

    def __init__(self, log):
        self.log, self.function, self.packed_metadata = log, None, None

    def launch_metadata(self, *_):
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        self.log.append((id(self), (x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.run(*grid, 0, None, None, None, None, None, *arguments)


def readable(launches, given) -> list:
    """Launches with a tensor's place among the given ones, or a number, in place of each tensor."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = {t.data_ptr(): f"given {i}" for i, t in enumerate(given) if t is not None}

    def of(x):
        if isinstance(x, TensorDescriptor):
            return "descriptor", of(x.base), x.shape, x.strides, x.block_shape, x.padding
        if isinstance(x, torch.Tensor):
            new = f"new {len(names)} {x.dtype} {x.untyped_storage().nbytes()}"
            return names.setdefault(x.data_ptr(), new)
        return (type(x).__name__, *map(of, x)) if isinstance(x, tuple) else x

    return [(which, grid, of(arguments)) for which, grid, arguments in launches]


def main() -> None:
    import torch
    from test_triton_compile import CompileOnlyDriver
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from d2m_kernels.backends.triton import ffn_fwd, launch, plans
    from d2m_kernels.contract import FFNAttrs, FFNInputs

    log: list = []

    def compile_nothing(self, key, signature, device, *_):
        return self.device_caches[device][0].setdefault(key, Compiled(log))

    driver.set_active(CompileOnlyDriver(90))
    JITFunction._do_compile, launch.programs = compile_nothing, lambda *_: 5

    def new(*size, dtype=torch.bfloat16):
        return torch.empty(*size, dtype=dtype)

    def stream(T, w2, gated):
        F = S + E * H
        routing = (new(T, K, dtype=torch.float32),
                   *(new(n, dtype=torch.int32) for n in (E + 1, T * K, T * K)))  # fmt: skip
        gate, b_gate = (new(F, D), new(F)) if gated else (None, None)
        return FFNInputs(new(T, D), new(F, D), gate, w2, new(F), b_gate, new(D), *routing)

    def call(count, one_w2, gated, save, block):
        """Fresh tensors; what was launched, the results' shapes and whether a plan did it."""
        w2 = new(D, S + E * H)
        streams = [stream(n, w2 if one_w2 else w2.clone(), gated) for n in T[:count]]
        ends = [(new(1, D), new(len(s.x), D)) if block else (None, None) for s in streams]
        attrs = FFNAttrs(S, "swiglu" if gated else "gelu_tanh", save=save)
        log.clear()
        results = ffn_fwd(streams, attrs, ends)
        given = [t for group in (*streams, *ends) for t in group]
        shapes = [[t if t is None else (t.shape, t.dtype) for t in r] for r in results]
        return readable(log, given), shapes

    ran, real = [], plans.Plan.run
    plans.Plan.run = lambda self, tensors: ran.append(1) or real(self, tensors)
    for case in ((1, False, False, False, False), (2, False, False, False, True),
                 (2, True, False, True, False), (1, False, True, True, False)):  # fmt: skip
        calls, kept = [call(*case) for _ in range(3)], len(ran)
        assert calls[0] == calls[1], "two unplanned calls differ"
        assert len(calls[0][0]) == 3 and kept == 1, f"{len(calls[0][0])} launches, {kept} planned"
        assert calls[2] == calls[0], f"{case}: the plan launches something else"
        ran.clear()
    # Where two streams share a weight, the plan of two that do not must not be used.
    assert call(2, True, False, False, True) == call(2, True, False, False, True)
    assert not ran


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1, 0)]
    main()
