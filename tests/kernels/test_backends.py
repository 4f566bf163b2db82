"""Which back-end serves, what it says when it cannot, and what bad input is answered with."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.cases import Case

from d2m_kernels import backends, combine, grouped_gemm, moe_ffn, permute, route


def test_the_compiled_extension_is_there_and_used():
    """The install builds it always; from inside the clone it must still be found."""
    assert backends.unavailable("cpu") is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.resolve(None, "cpu", dtype) == "cpu"
    assert backends.resolve(None, "cpu", torch.float64) == "reference"


def test_the_report_names_every_backend():
    out = subprocess.run(
        [sys.executable, "-m", "d2m_kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert "cpu        used" in out
    for name in backends.BACKENDS:
        assert name in out


def test_an_explicit_backend_that_cannot_serve_raises():
    with pytest.raises(RuntimeError, match="backend='cpu' cannot serve torch.float64 on cpu"):
        route(torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4), backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve"):
        route(torch.randn(3, 4), torch.randn(2, 4), backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'tpu'"):
        route(torch.randn(3, 4), torch.randn(2, 4), backend="tpu")


def test_a_back_end_is_an_attribute_of_the_package_and_nothing_else_is_lost():
    """Importing the back-end "torch" binds that name in the package."""
    from d2m_kernels.backends import torch as back_end

    assert back_end is backends.module("torch") and back_end is backends.torch
    x = torch.randn(3, 4)
    assert backends.router_backend(x, x, "torch") == "torch"
    assert backends.router_backend(x, x.double(), "torch") == "reference"


def test_constants_are_marked_as_torch_marks_them():
    """`backends` sets the mark by hand, since the decorator imports torch._dynamo."""
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked) and vars(marked).items() <= vars(backends.resolve).items()
    assert vars(marked).items() <= vars(backends.groups_streams).items()


def test_the_environment_pins_the_default(monkeypatch):
    monkeypatch.setenv(backends.ENV, "reference")
    assert backends.resolve(None, "cpu", torch.float32) == "reference"
    assert backends.resolve("torch", "cpu", torch.float32) == "torch"


def layer(**change):
    p = Case(T=6, D=8, S=4, H=4, E=3, k=2).build(grad=False)
    args = {"x": p["x"], "router": p["router"], "w1": p["w1"], "w2": p["w2"], "b1": p["b1"],
            "b2": p["b2"], "top_k": 2, "shared": 4} | change  # fmt: skip
    return moe_ffn(**args)


BAD = {
    "x: expected a torch.Tensor": {"x": [1.0]},
    "x: expected bf16": {"x": torch.ones(6, 8, dtype=torch.int64)},
    r"router: expected \[E >= 1, D = 8\], got \(3, 7\)": {"router": torch.randn(3, 7)},
    r"router: expected \[E, D\], got \(8,\)": {"router": torch.randn(8)},
    "router: expected a unit inner stride": {"router": torch.randn(8, 3).T},
    r"w1: expected \[F, D\].* = \(16, 8\), got \(15, 8\)": {"w1": torch.randn(15, 8)},
    r"w2: expected \[D = 8, F\], got \(7, 16\)": {"w2": torch.randn(7, 16)},
    "w2: expected a unit inner stride": {"w2": torch.randn(16, 8).T},
    r"b1: expected \[F\] = \(16,\)": {"b1": torch.randn(3)},
    r"b2: expected \[D\] = \(8,\)": {"b2": torch.randn(3)},
    "w1: expected torch.float32 like x, got .* bfloat16": {"w1": torch.randn(16, 8).bfloat16()},
    'top_k: expected 0..3 or "dense", got 4': {"top_k": 4},
    "top_k: .* got -1": {"top_k": -1},
    "top_k: .* got True": {"top_k": True},
    "top_k: .* got 'all'": {"top_k": "all"},
    "activation: expected one of gelu, gelu_tanh": {"activation": "tanh"},
    "shared: expected an int in 0..F = 16, got 17": {"shared": 17},
    "shared: F - shared must be E = 3 experts of equal size": {"shared": 5},
    "shared: .* 0 neurons": {"shared": 16},
    r"token_mask: expected x.shape\[:-1\] = \(6,\)": {
        "token_mask": torch.ones(5, dtype=torch.bool)
    },
    "token_mask: expected bool": {"token_mask": torch.ones(6)},
    "routing: expected a Routing, got dict": {"routing": {}},
    "routed_scale: expected a float, got str": {"routed_scale": "1"},
    r"w1: a pair \(up, gate\) needs a gated activation": {"w1": (torch.randn(16, 8),) * 2},
    r"w1: expected \[2F, D\].* = \(32, 8\)": {"activation": "geglu"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((ValueError, TypeError), match=message):
        layer(**BAD[message])


def test_a_routing_of_another_shape_is_refused():
    other = route(torch.randn(5, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"routing.ids: expected .* = \(6, 2\), got \(5, 2\)"):
        layer(routing=other)


def test_bad_input_of_the_stages():
    x, w = torch.randn(6, 8), torch.randn(3, 4, 8)
    offsets = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    r = route(x, torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"w: expected \[E, N, K = 8\]"):
        grouped_gemm(x, w[..., :7], offsets)
    with pytest.raises(ValueError, match=r"offsets: expected \[E \+ 1\] = \(4,\)"):
        grouped_gemm(x, w, offsets[:3])
    with pytest.raises(TypeError, match="offsets: expected int32"):
        grouped_gemm(x, w, offsets.long())
    with pytest.raises(ValueError, match="activation: expected one of .*swiglu.* with w_gate"):
        grouped_gemm(x, w, offsets, w_gate=w, activation="silu")
    with pytest.raises(ValueError, match="activation: expected .* got 'swiglu'"):
        grouped_gemm(x, w, offsets, activation="swiglu")
    with pytest.raises(TypeError, match="gather: expected int32"):
        grouped_gemm(x, w, offsets, gather=torch.zeros(6))
    with pytest.raises(ValueError, match=r"y: expected \[N = T\*K = 12, D\]"):
        combine(torch.randn(11, 4), r)
    with pytest.raises(ValueError, match=r"shared: expected \[T, D\] = \(6, 4\)"):
        combine(torch.randn(12, 4), r, shared=torch.randn(6, 5))
    with pytest.raises(TypeError, match="ids: expected int32"):
        permute(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="num_experts: expected an int >= 1, got 0"):
        permute(torch.zeros(3, 2, dtype=torch.int32), 0)


def test_a_meta_tensor_and_a_cpu_tensor_do_not_mix():
    with pytest.raises(ValueError, match="w1: expected on cpu like x"):
        layer(w1=torch.randn(16, 8, device="meta"))


def test_import_is_light():
    code = (
        "import sys\n"
        "for name in ('diffusers', 'sklearn', 'matplotlib', 'cupy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import d2m_kernels\n"
        "assert 'triton' not in sys.modules and 'd2m_models' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_multiplies_fp32_as_torch_was_told():
    """TF32 may have been allowed through any of torch's three ways; reading it must not raise."""
    pytest.importorskip("triton")
    from d2m_kernels.backends.triton.pieces import precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for tf32, ieee in (
            (lambda: torch.set_float32_matmul_precision("high"),
             lambda: torch.set_float32_matmul_precision("highest")),
            (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
             lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False)),
            (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
             lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")),
        ):  # fmt: skip
            tf32()
            assert precision(torch.float32) == "tf32" and precision(torch.bfloat16) == "ieee"
            ieee()
            assert precision(torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
