"""`moe_ffn_pair`: two streams of tokens, each with weights of its own, in one call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import CPU_BACKENDS, Case, compare_pair, run, run_pair, stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2m_kernels import Stream, backends, moe_ffn, moe_ffn_pair, route, why_two_calls

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPE = dict(D=16, S=8, H=8, E=4, k=2)


def two(first=37, second=5, **changes):
    sizes = SHAPE | changes
    return Case(T=first, seed=1, **sizes), Case(T=second, seed=2, **sizes)


def call(case, backend, **extra):
    return lambda p: moe_ffn(**p, **{**case.kwargs(), **extra}, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("tokens", [(37, 5), (1, 129), (0, 9), (20, 0), (0, 0)])
@pytest.mark.parametrize("k", [0, 2, "dense"])
def test_against_plain_torch(backend, tokens, k):
    compare_pair(two(*tokens, k=k), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
def test_bf16_gated_and_without_a_shared_expert(backend, activation):
    compare_pair(two(90, 70, D=50, H=40, S=0, activation=activation, dtype=torch.bfloat16), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_is_bitwise_two_calls(backend):
    """Forward and every gradient, with masks, a frozen shared expert and bias in one stream."""
    cases = two()
    cases[1].bias = False
    inputs = [c.build() for c in cases]
    masks = [torch.arange(c.T) % 3 != 0 for c in cases]
    extra = [dict(token_mask=m, freeze_shared=True) for m in masks]
    for ours, case, p, e in zip(
        run_pair(cases, inputs, backend, extra), cases, inputs, extra, strict=True
    ):
        for name, value in run(call(case, backend, **e), p).items():
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_shape_of_each_stream_and_its_routing_come_back(backend):
    cases = two(24, 6)
    a, b = (stream(c, c.build(grad=False)) for c in cases)
    a, b = replace(a, x=a.x.view(2, 3, 4, 16)), replace(b, x=b.x.view(2, 3, 16))
    (ya, ra), (yb, rb) = moe_ffn_pair(a, b, backend=backend, return_routing=True)
    assert ya.shape == a.x.shape and yb.shape == b.x.shape
    assert ra.ids.shape == (24, 2) and rb.ids.shape == (6, 2)
    again = moe_ffn_pair(replace(a, routing=ra), replace(b, routing=rb), backend=backend)
    torch.testing.assert_close(again, (ya, yb))


def test_a_nan_row_stays_its_own_streams_problem():
    cases = two()
    inputs = [c.build(grad=False) for c in cases]
    clean = moe_ffn_pair(*(stream(c, p) for c, p in zip(cases, inputs, strict=True)))
    inputs[0]["x"][3] = float("nan")
    bad = moe_ffn_pair(*(stream(c, p) for c, p in zip(cases, inputs, strict=True)))
    assert torch.equal(bad[1], clean[1]) and bad[0][3].isnan().all()
    rest = torch.arange(cases[0].T) != 3
    torch.testing.assert_close(bad[0][rest], clean[0][rest])


@pytest.mark.parametrize(
    "changes",
    [dict(D=8), dict(H=16), dict(E=2), dict(k=1), dict(S=0), dict(activation="silu"),
     dict(scale=2.0), dict(dtype=torch.float64), dict(k="dense")],
)  # fmt: skip
def test_streams_that_differ_take_two_calls_and_say_so(changes):
    cases = Case(T=9, **SHAPE), Case(T=4, **(SHAPE | changes))
    inputs = [c.build() for c in cases]
    streams = [stream(c, p) for c, p in zip(cases, inputs, strict=True)]
    assert why_two_calls(*streams).startswith("the streams differ in ")
    for ours, case, p in zip(run_pair(cases, inputs, None), cases, inputs, strict=True):
        for name, value in run(call(case, None), p).items():
            assert torch.equal(ours[name], value), name


def test_why_two_calls_names_the_back_end():
    streams = [stream(c, c.build()) for c in two()]
    for name in CPU_BACKENDS:
        assert why_two_calls(*streams, backend=name) == (
            f"the back-end {name} runs streams one after another"
        )
        assert not backends.groups_streams(name)


def test_triton_groups_streams():
    pytest.importorskip("triton")
    assert backends.groups_streams("triton")


def test_errors_name_the_stream():
    a, b = (stream(c, c.build()) for c in two())
    with pytest.raises(ValueError, match=r"^second: w2: expected \[D = 16, F\]"):
        moe_ffn_pair(a, replace(b, w2=b.w2[:3]))
    with pytest.raises(TypeError, match="^first: expected a Stream, got dict"):
        moe_ffn_pair({"x": a.x}, b)
    with pytest.raises(ValueError, match="^backend|^first: backend"):
        moe_ffn_pair(a, b, backend="fast")


def test_only_one_output_in_the_loss():
    cases = two()
    inputs = [c.build() for c in cases]
    y, _ = moe_ffn_pair(*(stream(c, p) for c, p in zip(cases, inputs, strict=True)))
    grads = torch.autograd.grad(y.sum(), [*inputs[0].values(), *inputs[1].values()])
    alone = torch.autograd.grad(call(cases[0], None)(inputs[0]).sum(), list(inputs[0].values()))
    assert all(torch.equal(g, e) for g, e in zip(grads, alone, strict=False))
    assert not any(g.any() for g in grads[6:])


def test_nothing_more_is_saved_than_by_two_calls():
    cases = two(bias=False)

    def saved(function):
        sizes = []

        def pack(t):
            sizes.append((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            keep = function()
        del keep
        return sum(dict(sizes).values())

    inputs = [c.build() for c in cases]
    pairs = list(zip(cases, inputs, strict=True))
    one = saved(lambda: moe_ffn_pair(*(stream(c, p) for c, p in pairs), backend="cpu"))
    other = saved(lambda: [call(c, "cpu")(p) for c, p in pairs])
    assert one == other > 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shared_tensor", [False, True])
def test_compiles_without_a_graph_break(backend, shared_tensor):
    torch._dynamo.reset()
    cases = two()
    inputs = [c.build() for c in cases]
    if shared_tensor:
        inputs[1]["b2"] = inputs[0]["b2"]

    def function(a, b):
        streams = (Stream(**p, **c.kwargs()) for c, p in zip(cases, (a, b), strict=True))
        return moe_ffn_pair(*streams, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [*inputs[0].values(), *inputs[1].values()]
    results = []
    for f in (compiled, function):
        ys = f(*inputs)
        results.append((ys, torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)))
    torch.testing.assert_close(*results)


def test_autocast():
    cases = two()
    inputs = [c.build() for c in cases]
    with torch.autocast("cpu", torch.bfloat16):
        ours = moe_ffn_pair(*(stream(c, p) for c, p in zip(cases, inputs, strict=True)))
        alone = [call(c, None)(p) for c, p in zip(cases, inputs, strict=True)]
    for y, e in zip(ours, alone, strict=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, e)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    tokens=st.tuples(st.integers(0, 60), st.integers(0, 60)), D=st.integers(1, 24),
    S=st.integers(0, 20), H=st.integers(1, 9), E=st.integers(1, 9), k=st.integers(0, 9),
    seed=st.integers(0, 99), activation=st.sampled_from(["gelu_tanh", "silu", "geglu"]),
    masked=st.tuples(st.booleans(), st.booleans()), backend=st.sampled_from(["cpu", "torch"]),
)  # fmt: skip
def test_any_two_streams(tokens, D, S, H, E, k, seed, activation, masked, backend):
    """Both streams are what the reference makes of each alone, forward and gradients.

    It is given the back-end's routing: sums in another order may swap experts that all but tie.
    """
    size = dict(D=D, S=S, H=H, E=E, k=min(k, E), activation=activation)
    cases = [Case(T=T, seed=seed + i, **size) for i, T in enumerate(tokens)]
    inputs = [case.build() for case in cases]
    extra = [
        dict(token_mask=torch.arange(c.T) % 2 == 0) if m else {}
        for c, m in zip(cases, masked, strict=True)
    ]
    together = run_pair(cases, inputs, backend, extra)
    for ours, case, p, e in zip(together, cases, inputs, extra, strict=True):
        with torch.no_grad():
            routing = route(p["x"], p["router"], top_k=case.k, backend=backend, **e)
        for name, value in run(call(case, "reference", routing=routing), p).items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
