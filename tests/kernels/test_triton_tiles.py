"""Every tile of the tables of configs, run under Triton's interpreter against plain torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers.cases import Case, assert_as_good_as_torch, compare, run
from helpers.triton_cases import INTERPRETED, arithmetic, every_pin, run_interpreted
from test_grouped_gemm import expected, problem

ARCHS = ("sm90", "sm80")
pytest.importorskip("triton")

if not INTERPRETED:

    @pytest.mark.slow
    def test_every_tile_under_the_interpreter():
        run_interpreted(__file__)

else:
    from d2m_kernels import grouped_gemm
    from d2m_kernels.backends.triton import configs

    pytestmark = [
        pytest.mark.usefixtures("poisoned"),
        pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy: exp that overflows
    ]
    ROWS = every_pin(ARCHS)

    def test_no_tile_is_left_out():
        tried = {tuple(entry.split("=")) for _, pin in ROWS for entry in pin.split(",")}
        tried = {(stage, arithmetic(configs.named(name))) for stage, name in tried}
        for arch in ARCHS:
            for stage in configs.STAGES:
                for config in (*configs.candidates(stage, arch), configs.RAGGED):
                    assert (stage, arithmetic(config)) in tried, f"{arch} {stage} {config.name}"

    @pytest.mark.parametrize("activation,pin", ROWS)
    def test_layer_and_gradients(activation, pin, monkeypatch):
        """160 tokens, 72 and 136 neurons, 144 columns: tiles with a remainder in every direction,
        sums longer than one block, and rows that TMA can address."""
        monkeypatch.setenv(configs.ENV, pin)
        case = Case(T=160, D=144, S=136, H=72, E=3, k=2, activation=activation,
                    dtype=torch.bfloat16, scale=1.3)  # fmt: skip
        compare(case, "triton")

    @pytest.mark.parametrize("activation,pin", ROWS)
    def test_grouped_gemm(activation, pin, monkeypatch):
        """Consecutive rows in place of gathered ones; 140 of the 180 belong to one expert."""
        monkeypatch.setenv(configs.ENV, pin)
        offsets = [0, 0, 140, 171, 171]
        gated = activation == "swiglu"
        p, _ = problem(72, 136, 180, torch.bfloat16, False, gated)

        def ours(q):
            bias = (q["bias"], q["bias_gate"]) if gated else q["bias"]
            return grouped_gemm(q["x"], q["w"], torch.tensor(offsets, dtype=torch.int32), bias=bias,
                                w_gate=q.get("w_gate"), activation=activation,
                                backend="triton")  # fmt: skip

        exact = {n: t.detach().double().requires_grad_() for n, t in p.items()}
        want = run(lambda q: expected(q, offsets, None, activation), exact)
        own = run(lambda q: expected(q, offsets, None, activation), p)
        for name, value in run(ours, p).items():
            assert_as_good_as_torch(value, want[name], own[name], name)

    def test_what_the_sanitizers_watch_is_every_kernel(monkeypatch):
        from triton.runtime.interpreter import InterpretedFunction

        launched, plain = set(), InterpretedFunction.run

        def run_and_note(self, *args, **kwargs):
            launched.add(self.fn.__name__)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", run_and_note)
        path = Path(__file__).parents[1] / "gpu" / "sanitize.py"
        spec = importlib.util.spec_from_file_location("sanitize", path)
        sanitize = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sanitize)
        sanitize.every_kernel("triton", "cpu")
        kernels = {
            name for module in sys.modules if module.startswith("d2m_kernels.backends.triton")
            for name, value in vars(sys.modules[module]).items()
            if name.endswith("_kernel") and isinstance(value, InterpretedFunction)
        }  # fmt: skip
        assert len(kernels) == 9 and launched == kernels
