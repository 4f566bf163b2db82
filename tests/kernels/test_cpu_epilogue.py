"""Without gradients, the back-end "cpu" has bias and activation in oneDNN's epilogue."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case, assert_as_good_as_torch, available, call, plain_torch

from d2m_kernels import onednn

pytestmark = [
    pytest.mark.skipif(not available("cpu", dtype=torch.bfloat16), reason="no compiled back-end"),
    pytest.mark.skipif(not onednn.fast_bf16(), reason="oneDNN has no bf16 on this CPU"),
]
BF16 = dict(dtype=torch.bfloat16, scale=1.3)


@pytest.fixture
def products(monkeypatch):
    """How many rows each product with an epilogue had."""
    rows, real = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, *a: rows.append(len(x)) or real(x, *a))
    return rows


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(T=129, D=33, S=5, H=7, E=3),
        dict(T=1, D=1, S=1, H=1, E=1, k=1),
        dict(T=1100, D=100, S=130, H=33, E=7),
        dict(T=128, D=64, S=0, H=32, E=12),
        dict(T=40, D=16, S=48, H=8, E=4, k=0),
        dict(T=300, D=16, S=8, H=8, E=64, k=3),
    ],
    ids=str,
)
def test_as_good_as_torch(sizes, bias, activation, products):
    case = Case(**sizes, bias=bias, activation=activation, **BF16)
    p = case.build(grad=False)
    wide = {n: None if t is None else t.double() for n, t in p.items()}
    y, routing = call(case, "cpu", return_routing=True)(p)
    assert sum(products) == case.T * (case.S > 0) + case.T * case.k
    ids = routing.ids if case.k else None
    exact, own = plain_torch(case, wide, ids), plain_torch(case, p, ids)
    assert_as_good_as_torch(y, exact, own, str(case))
    assert torch.equal(y, call(case, "cpu")(p))


def test_bad_rows_stay_where_they_are():
    case = Case(T=200, D=48, S=32, H=16, E=5, **BF16)
    p = case.build(grad=False)
    clean = call(case, "cpu")(p)
    p["x"][7], p["x"][150] = float("nan"), float("inf")
    y = call(case, "cpu")(p)
    assert y[7].isnan().all() and not y[150].isfinite().any()
    good = torch.ones(200, dtype=torch.bool)
    good[[7, 150]] = False
    torch.testing.assert_close(y[good], clean[good])


@pytest.mark.parametrize("strided", ["x", "w1"])
def test_strided_inputs_take_the_other_way(strided, products):
    """oneDNN's reference code for strided weights is a thousand times slower."""
    case = Case(T=70, D=32, S=16, H=16, E=4, **BF16)
    p = case.build(grad=False)
    expected = call(case, "cpu")(p)
    assert products
    products.clear()
    wide = torch.zeros(*p[strided].shape[:-1], 2 * p[strided].shape[-1], dtype=torch.bfloat16)
    view = wide[:, : p[strided].shape[-1]]
    view.copy_(p[strided])
    p[strided] = view
    torch.testing.assert_close(call(case, "cpu")(p), expected, rtol=2e-2, atol=2e-2)
    assert not products
