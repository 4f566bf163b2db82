"""Torch's private oneDNN ops: where one is gone, raises or is wrong, plain torch does its work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import Case, available, call, compare

from d2m_kernels import onednn
from d2m_kernels.activations import pointwise


@pytest.fixture(params=["gone", "raises", "wrong"])
def broken(request, monkeypatch):
    """torch.ops.mkldnn as another torch may have it, and nothing known of the one before."""

    def raises(*_):
        raise RuntimeError("mkldnn::_linear_pointwise() is missing value for argument 'attr'")

    def wrong(x, w, b, *_):
        return torch.zeros(len(x), len(w), dtype=x.dtype)

    ops = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True)
    if request.param == "gone":
        ops = SimpleNamespace()
    else:
        ops._linear_pointwise = {"raises": raises, "wrong": wrong}[request.param]

    def forget():
        onednn.fast_bf16.cache_clear()
        onednn._epilogues_are_right.cache_clear()

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "mkldnn", ops)
        forget()
        yield request.param
    forget()


def test_what_fails_is_not_used_again(broken):
    assert not onednn.has_epilogue(torch.bfloat16, "gelu_tanh")
    assert onednn.fast_bf16() == (broken != "gone" and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("activation", onednn.EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_falls_back(broken, activation, dtype):
    x, w, b = (torch.randn(*size).to(dtype) for size in ((5, 4), (3, 4), (3,)))
    for bias in (b, None):
        expected = pointwise(activation, F.linear(x, w, bias))
        assert torch.equal(onednn.linear(x, w, bias, activation), expected)


@pytest.mark.skipif(not available("cpu", dtype=torch.bfloat16), reason="no compiled back-end")
def test_the_layer_gives_the_same(broken):
    case = Case(T=70, D=32, S=16, H=16, E=4, dtype=torch.bfloat16)
    p = case.build(grad=False)
    exact = call(case, "reference")({n: t.double() for n, t in p.items()})
    torch.testing.assert_close(call(case, "cpu")(p).double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("activation", onednn.EPILOGUES)
def test_linear_here(activation):
    """With whatever this torch and this CPU have."""
    x, w, b = (torch.randn(*size).bfloat16() for size in ((5, 4), (3, 4), (3,)))
    exact = pointwise(activation, F.linear(x.double(), w.double(), b.double()))
    ours = onednn.linear(x, w, b, activation).double()
    torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not available("cpu", dtype=torch.bfloat16), reason="no compiled back-end")
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_the_arithmetic_multiplies_in_fp32(dtype, activation, monkeypatch):
    """As on AVX2: every product gets fp32, forward and backward, and the rest is as good."""
    real, seen = torch.mm, set()

    def mm(a, b, **out):
        seen.update((a.dtype, b.dtype))
        return real(a, b, **out)

    monkeypatch.setattr(onednn, "is_slow", lambda given: given in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(torch, "mm", mm)
    for T, k in ((1, 2), (129, 2), (64, 0), (33, "dense")):
        compare(Case(T=T, D=32, k=k, dtype=dtype, activation=activation), "cpu")
    case = Case(T=0, D=32, dtype=dtype, activation=activation)
    assert call(case, "cpu")(case.build()).shape == (0, 32)
    assert seen == {torch.float32}


def test_a_cpu_is_slow_only_where_onednn_says_so(monkeypatch):
    answers = {
        "_is_mkldnn_bf16_supported": lambda: True,
        "_is_mkldnn_fp16_supported": lambda: False,
    }
    for ops, bf16, fp16 in ((answers, False, True), ({}, False, False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "mkldnn", SimpleNamespace(**ops))
            onednn.is_slow.cache_clear()
            found = [onednn.is_slow(d) for d in (torch.bfloat16, torch.float16, torch.float32)]
        assert found == [bf16, fp16, False]
    onednn.is_slow.cache_clear()
