"""AdaLN compression: exact at full width, optimal below, with its error reported."""

import pytest
import torch
from helpers.tiny_flux import DIM, converted, dense_flux, flux_inputs, random_orders, small_config
from torch.nn import functional as F

from d2m_models import AdaLNBasis, FluxMoEConfig, adaln, adaln_state, convert_flux, to_dense
from d2m_models.adaln import adaln_linears, sample_conditioning


def run(model):
    with torch.no_grad():
        return model(**flux_inputs()).sample


def test_full_width_is_exact():
    dense = dense_flux()
    temb = sample_conditioning(dense, 100)
    model = convert_flux(dense, small_config(adaln_dim=DIM), random_orders(dense), temb)
    model.set_top_k("dense")
    torch.testing.assert_close(run(model), run(dense), rtol=1e-5, atol=1e-5)
    assert max(model.adaln_report.values()) < 1e-6


def test_conditioning_that_fits_the_subspace_is_exact_and_the_mean_is_kept():
    torch.manual_seed(0)
    s = torch.randn(200, 3).double() @ torch.randn(3, 20).double() * 0.05 + 3 + torch.rand(20)
    # silu is invertible above its minimum: find temb with silu(temb) = s
    temb = s.clone()
    for _ in range(50):
        sig = torch.sigmoid(temb)
        temb = temb - (temb * sig - s) / (sig + temb * sig * (1 - sig))
    torch.testing.assert_close(F.silu(temb), s)
    basis = AdaLNBasis.from_samples(temb, 3)
    w, b = torch.randn(7, 20).double(), torch.randn(7).double()
    down, shift = basis.down_projection()
    w_small, b_small = basis.compress(w, b)
    assert w_small.shape == (7, 3)
    got = (s @ down.T + shift) @ w_small.T + b_small
    torch.testing.assert_close(got, s @ w.T + b)
    assert basis.explained == pytest.approx(1.0) and basis.relative_error(temb, w, b) < 1e-6
    # were the mean not absorbed, three directions could not hold three and the mean
    assert AdaLNBasis.from_samples(temb, 2).relative_error(temb, w, b) > 1e-3


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_weights_with_and_without_bf16_products(fast, monkeypatch):
    monkeypatch.setattr(adaln, "fast_bf16", lambda: fast)
    g = torch.Generator().manual_seed(0)
    temb, weight, bias = (torch.randn(*n, generator=g) for n in ((50, 16), (8, 16), (8,)))
    basis, weight = AdaLNBasis.from_samples(temb, 16), weight.bfloat16()
    exact = basis.compress(weight.double(), bias.double())
    for ours, expected in zip(basis.compress(weight, bias), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0.02, atol=0.02)


def test_error_falls_with_width_and_beats_a_random_basis():
    dense = dense_flux()
    temb = sample_conditioning(dense, 300)
    errors = []
    for width in (4, 16, 48, 64):
        config = FluxMoEConfig(
            moe=None, dense_double_blocks=(), adaln_dim=width, num_layers=2, num_single_layers=4
        )
        report = convert_flux(dense, config, adaln_calibration=temb).adaln_report
        assert set(report) == set(adaln_linears(dense)) and len(report) == 2 * 2 + 4 + 1
        errors.append(sum(report.values()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[0]
    linear = dense.norm_out.linear
    basis = AdaLNBasis.from_samples(temb, 16)
    random, _ = torch.linalg.qr(torch.randn(DIM, 16, dtype=torch.float64))
    other = AdaLNBasis(basis.mean, random.T, 0.0)
    args = (temb, linear.weight, linear.bias)
    assert basis.relative_error(*args) < other.relative_error(*args)


def test_reported_error_is_the_models_error():
    dense, model = converted(adaln_dim=16)
    temb = sample_conditioning(dense)
    with torch.no_grad():
        exact = dense.norm_out.linear(F.silu(temb))
        got = model.norm_out.linear(model.adaln_down(F.silu(temb)))
    error = ((got - exact).norm() / exact.norm()).item()
    assert error == pytest.approx(model.adaln_report["norm_out.linear"], rel=1e-3)


def test_fewer_samples_than_directions():
    dense = dense_flux()
    basis = AdaLNBasis.from_samples(sample_conditioning(dense, 5), 32)
    eye = basis.directions @ basis.directions.T
    torch.testing.assert_close(eye, torch.eye(32, dtype=torch.float64))


def test_back_to_dense_needs_the_original_adaln():
    dense, model = converted(adaln_dim=16)
    with pytest.raises(ValueError, match="adaln"):
        to_dense(model)
    back = to_dense(model, adaln_state(dense))
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "calibration, words",
    [
        (torch.randn(10, 3), "D=64"),
        (torch.randn(1, DIM), "n >= 2"),
        (torch.full((10, DIM), torch.nan), "NaN"),
        ([1, 2], "list"),
    ],
)
def test_bad_calibration(calibration, words):
    with pytest.raises(ValueError, match=words):
        convert_flux(dense_flux(), small_config(adaln_dim=8), adaln_calibration=calibration)


def test_other_bad_input():
    dense = dense_flux()
    with pytest.raises(ValueError, match="1..64"):
        convert_flux(dense, small_config(adaln_dim=65))
    with pytest.raises(ValueError, match="adaln_dim=None"):
        convert_flux(dense, small_config(), adaln_calibration=torch.randn(9, DIM))
