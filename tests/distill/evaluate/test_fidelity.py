"""Fidelity against published formulas, by hand and by the field's libraries."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("diffusers")

from distill.evaluate import fidelity


def images(seed, *shape):
    return np.random.default_rng(seed).random(shape)


def test_psnr():
    a = np.zeros((4, 4))
    assert fidelity.psnr(a + 0.1, a) == pytest.approx(20)
    assert fidelity.psnr(a, a) == fidelity.HIGHEST_PSNR


@pytest.mark.parametrize("shape", [(24, 24, 3), (8, 8)])
def test_ssim(shape):
    """8 x 8 is narrower than the Gaussian window, as the demo's digits are."""
    a, b = images(0, *shape), images(1, *shape)
    assert fidelity.ssim(a, a) == pytest.approx(1)
    assert fidelity.ssim(a, 0.9 * a + 0.1 * b) > fidelity.ssim(a, b)


def test_ssim_is_torchmetrics_without_its_border():
    """torchmetrics also averages the 5 pixels whose windows reach over the edge; Wang et al. do
    not."""
    metrics = pytest.importorskip("torchmetrics.functional.image")
    a, b = images(0, 24, 24, 3), images(1, 24, 24, 3)
    tensors = [torch.from_numpy(i).permute(2, 0, 1)[None] for i in (a, b)]
    _, full = metrics.structural_similarity_index_measure(
        *tensors, data_range=1.0, return_full_image=True
    )
    assert fidelity.ssim(a, b) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-9)


def test_latent_mse():
    teacher = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    assert fidelity.latent_mse(teacher, teacher) == [0, 0]
    ours = torch.tensor([[[3.0, 9.0]], [[0.0, 0.0]]])
    assert fidelity.latent_mse(ours, teacher) == pytest.approx([1, 1])


def test_cmmd():
    """One feature a set: 1000 (1 + 1 - 2 exp(-|x - y|^2 / 200)), |x - y|^2 = 2 for right angles."""
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert fidelity.cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)))
    many = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    assert fidelity.cmmd(many, many) == pytest.approx(0, abs=1e-6)


def test_fid():
    """Two values a set: means 1 and 4, variances 2 and 8: 9 + (sqrt 2 - sqrt 8)^2."""
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [6.0]])
    assert fidelity.fid(x, y) == pytest.approx(9 + (math.sqrt(2) - math.sqrt(8)) ** 2)
    many = torch.from_numpy(images(0, 50, 6))
    assert fidelity.fid(many, many) == pytest.approx(0, abs=1e-6)


def test_fid_is_torchmetrics():
    compute = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    x, y = (torch.from_numpy(images(seed, 40, 6)) ** (1 + seed) for seed in (0, 1))
    parts = [part for f in (x, y) for part in (f.mean(0), torch.cov(f.T))]
    assert fidelity.fid(x, y) == pytest.approx(float(compute(*parts)), rel=1e-6)


def test_pixels_in_memory():
    grey = torch.from_numpy(images(0, 3, 8, 8))
    assert fidelity.pixels(grey, grey) == {"psnr": 100.0, "ssim": pytest.approx(1)}
