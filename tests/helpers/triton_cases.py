"""What tests of the Triton kernels share: the interpreter's process, and the tables' tiles.

The interpreter has to be chosen before Triton is imported and changes every kernel of a process. A
file whose tests want it runs itself in a process of its own (`run_interpreted`); there
`INTERPRETED` is true and `BACKENDS` is "triton", which then serves CPU tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cases import CPU_BACKENDS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("triton",) if INTERPRETED else CPU_BACKENDS
# The layer's launches, and how its first one is called where the activation is gated.
UP = {"gelu_tanh": "up", "swiglu": "up_gated"}


def patch_once_a_launch() -> None:
    """The interpreter patches Triton's language at a launch, and again at every call of a device
    function, which takes a third of its time. Here once a launch for each module it is seen as."""
    from triton.runtime import interpreter

    launch, patch, done = interpreter.GridExecutor.__call__, interpreter._patch_lang, {}

    def run(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    def patch_first(fn):
        seen = frozenset(
            id(value) for value in fn.__globals__.values()
            if value is interpreter.tl or value is interpreter.tl.core
        )  # fmt: skip
        if seen not in done:
            done[seen] = patch(fn)
        return done[seen]

    interpreter.GridExecutor.__call__, interpreter._patch_lang = run, patch_first


if INTERPRETED:
    patch_once_a_launch()


def run_interpreted(file: str, *options: str, seconds: float = 1800) -> str:
    """pytest on `file` with every kernel interpreted: what it printed; fails if it did."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, *options]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=seconds,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton does not run with NumPy >= 2.4")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def arithmetic(config):
    """What of a tile decides the numbers and the code an interpreter walks: not warps and stages,
    but in how many parts an epilogue that follows from them takes it."""
    parts = tuple(config.parts(most) for most in (16, 32, 64))
    tile = replace(config, warps=0, stages=0, per_sm=0, max_registers=None, group_m=0,
                   fence=True)  # fmt: skip
    return tile, parts


def pins(archs, activation: str, same=arithmetic) -> list[str]:
    """Values of D2M_TRITON_CONFIG that give each launch of the layer each tile of the tables once.

    Tiles that are the `same` count as one; a launch that has had all of its own gets the small one.
    """
    from d2m_kernels.backends.triton import configs

    rows: dict[str, list] = {}
    for stage in configs.STAGES:
        if stage in UP.values() and stage != UP[activation]:
            continue
        tiles = {}
        for arch in archs:
            for config in configs.candidates(stage, arch):
                if config != configs.SMALL:
                    tiles.setdefault(same(config), config)
        rows[stage] = [*tiles.values(), configs.RAGGED, configs.SMALL]
    return [
        ",".join(f"{stage}={c[min(i, len(c) - 1)].name}" for stage, c in rows.items())
        for i in range(max(map(len, rows.values())))
    ]


def every_pin(archs, same=arithmetic) -> list[tuple[str, str]]:
    """(activation, pin) of all that `pins` gives."""
    return [(activation, pin) for activation in UP for pin in pins(archs, activation, same)]
