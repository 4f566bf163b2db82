"""The torch.library ops `d2m::*`: schemas, fake implementations, dtypes without a device."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.cases import CPU_BACKENDS, Case
from helpers.triton_cases import BACKENDS, INTERPRETED, run_interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_kernels import moe_ffn, route
from d2m_kernels.activations import is_gated
from d2m_kernels.contract import FFNAttrs, FFNInputs
from d2m_kernels.ffn import halves

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(backend: str, activation: str = "gelu_tanh", k: int = 2):
    """Arguments of every op, from one small layer."""
    case = Case(T=9, D=8, S=4, H=4, E=3, k=k, activation=activation)
    p = case.build(grad=False)
    r = route(p["x"], p["router"], top_k=k, backend=backend)
    slots = (r.weights, r.offsets, r.order, r.inverse)
    one = [p["x"], p["w1"], None, p["w2"], p["b1"], None, p["b2"], *slots]
    x2 = p["x"][:4] + 1  # a second, shorter stream with weights of its own and without biases
    r2 = route(x2, p["router"], top_k=k, backend=backend)
    slots = (r2.weights, r2.offsets, r2.order, r2.inverse)
    two = [*one, x2, p["w1"] + 1, None, p["w2"] + 1, None, None, None, *slots]
    settings = (backend, case.S, activation, False, 1.5, 2, True)
    y, *zs = torch.ops.d2m.ffn_fwd(one, [], *settings)
    y2, *zs2 = torch.ops.d2m.ffn_fwd(two[11:], [], *settings)
    needs = [True, True, False, True, True, False, True, True] + [False] * 3
    needs2 = [True, False, False, True, False, False, False, True] + [False] * 3
    up, gate = halves(p["w1"], False) if is_gated(activation) else (p["w1"], None)
    experts = up[case.S :].reshape(3, 4, 8)
    gates = None if gate is None else gate[case.S :].reshape(3, 4, 8)
    gather = r.order // max(k, 1)
    gemm = (p["x"], experts, r.offsets, gates, gather, None, None, activation)
    rows = torch.randn(9 * k, 4)
    return {
        "route": (p["x"], p["router"], k, None, backend),
        "permute": (r.ids, 3, backend),
        "grouped_gemm": (*gemm, backend),
        "grouped_gemm_bwd": (rows, *gemm, [True, True, gate is not None, False, False], backend),
        "combine": (torch.randn(9 * k, 8), r.inverse.view(9, k), r.weights, r.offsets, p["x"],
                    p["b2"], 1.5, backend),
        "ffn_fwd": (one, [], *settings),
        "ffn_bwd": ([torch.ones_like(y)], one, zs, needs, *settings),
        "modulate_route": (p["x"], p["w1"][:3], p["w1"][3:6], 1e-6, p["router"], k, None, backend),
        "ffn_fwd of two": (two, [p["x"][:3], p["x"], None, x2], *settings[:-1], False),
        "ffn_fwd of two, saved": (two, [], *settings),
        "ffn_bwd of two": ([y + 1, y2], two, [*zs, *zs2], needs + needs2, *settings),
    }  # fmt: skip


OPS = ["route", "permute", "grouped_gemm", "grouped_gemm_bwd", "combine", "ffn_fwd", "ffn_bwd",
       "ffn_fwd of two", "ffn_fwd of two, saved", "ffn_bwd of two", "modulate_route"]  # fmt: skip


def overload(op: str):
    return getattr(torch.ops.d2m, op.split()[0]).default


# Every op's arguments of one back-end, activation and top-k, made once.
every = functools.cache(arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "activation,k",
    [("swiglu", 2), ("gelu_tanh", 1), ("gelu_tanh", 0), ("gelu_tanh", 2)][: 4 - INTERPRETED],
)
def test_opcheck(op, backend, activation, k):
    torch.library.opcheck(overload(op), every(backend, activation, k)[op], test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [op for op in OPS if op != "permute"])  # it takes integers only
def test_autograd_registration(op, backend):
    """Bare ops given tensors that require gradients: outputs carry none, nothing is recorded."""

    def leaf(a):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            return a.detach().clone().requires_grad_()
        return [leaf(entry) for entry in a] if isinstance(a, list) else a

    args = tuple(leaf(a) for a in every(backend, "swiglu", 2)[op])
    torch.library.opcheck(overload(op), args, test_utils="test_autograd_registration")


if not INTERPRETED:

    @pytest.mark.slow
    def test_opcheck_under_the_interpreter():
        run_interpreted(__file__, "-k", "triton")


def test_no_op_is_left_unchecked():
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("d2m::")
    }
    assert defined == {op.split()[0] for op in OPS}


@pytest.mark.parametrize("k", [0, 2, "dense"])
def test_fake_tensors_need_no_data(k):
    case = Case(k=k, dtype=torch.bfloat16)
    with FakeTensorMode():
        p = {n: torch.empty_like(t) for n, t in case.build(grad=False).items()}
        y, r = moe_ffn(*p.values(), **case.kwargs(), return_routing=True)
    assert y.shape == (case.T, case.D) and y.dtype == torch.bfloat16
    slots = case.T * (k if isinstance(k, int) else 0)
    assert r.order.shape == (slots,) and r.probs.dtype == torch.float32


def test_meta_tensors_give_shapes():
    case = Case(k=2)
    p = {n: t.to("meta") for n, t in case.build(grad=False).items()}
    y = moe_ffn(*p.values(), **case.kwargs())
    assert y.is_meta and y.shape == (case.T, case.D)


def test_ops_run_on_their_tensors_device(monkeypatch):
    """Triton launches on the current device; an op makes its first tensor's device the current."""
    from types import SimpleNamespace

    from d2m_kernels.op import _on_its_device

    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", i)) for i in (0, 1)]
    op = _on_its_device(lambda first, *_: entered.append("ran"))
    for first in (torch.zeros(1), there[0], there[1], [there[1], None], [there[0]]):
        op(first, 7)
    on_one = [torch.device("cuda", 1), "ran", "left"]
    assert entered == ["ran", "ran", *on_one, *on_one, "ran"]


def test_torch_back_end_without_routed_experts_gives_what_the_fake_says():
    case = Case(T=9, D=8, S=0, H=4, E=3, k=0)
    p = case.build(grad=False)
    weights, slots = torch.zeros(9, 0), torch.zeros(0, dtype=torch.int32)
    offsets = torch.zeros(4, dtype=torch.int32)
    stream = FFNInputs(
        p["x"], p["w1"], None, p["w2"], None, None, None, weights, offsets, slots, slots
    )
    for backend in CPU_BACKENDS:
        args = ([*stream], [], backend, *FFNAttrs(0, "gelu_tanh", save=True))
        torch.library.opcheck(torch.ops.d2m.ffn_fwd.default, args, test_utils=CHECKS)
