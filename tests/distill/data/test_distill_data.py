"""Batches are a function of (seed, step); flow matching's x_t and target; sampling's integrator."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")

from helpers.batches import equal

from distill.data.batch import flux_shift, generator, sample_timesteps
from distill.data.digits import Digits, patchify, unpatchify


@pytest.fixture(scope="module")
def digits():
    return Digits("train")


def test_batches_depend_on_seed_and_step_alone(digits):
    first = digits.batch(3, 17, 8)
    torch.manual_seed(99)
    torch.rand(5)
    assert equal(first, Digits("train").batch(3, 17, 8))
    assert not torch.equal(first.noise, digits.batch(3, 18, 8).noise)
    assert not torch.equal(first.noise, digits.batch(4, 17, 8).noise)
    assert not torch.equal(first.noise, digits.batch(3, 17, 8, "calibrate").noise)


@pytest.mark.parametrize("kind", ["uniform", "flux-shift", "grid"])
def test_a_rank_gets_its_rows_of_the_global_batch(kind):
    grid = [1.0, 0.5, 0.25] if kind == "grid" else None
    digits = Digits("train", kind, grid)
    whole = digits.batch(3, 17, 8)
    for rows in (slice(0, 3), slice(3, 8), slice(5, 6)):
        part = digits.batch(3, 17, 8, rows=rows)
        assert equal(part, whole[rows]) and len(part) == rows.stop - rows.start
        assert torch.equal(part.noise, whole.noise[rows]) and torch.equal(part.t, whole.t[rows])
        assert torch.equal(part.img_ids, whole.img_ids)


def test_guidance_reaches_the_model(digits):
    batch = digits.batch(0, 0, 4)
    assert "guidance" not in batch.inputs()
    guided = replace(batch, guidance=torch.tensor([3.5, 3.5, 1.0, 2.0]))
    assert guided[2:].to("cpu").inputs()["guidance"].tolist() == [1.0, 2.0]


def test_global_rng_is_left_alone(digits):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    digits.batch(0, 0, 8)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [1, 50, 64])
def test_every_sample_once_an_epoch(digits, size):
    n, steps = len(digits), -(-2 * len(digits) // size)
    seen = torch.cat([digits.epochs(1, s, size) for s in range(steps)])
    for epoch in (0, 1):
        assert torch.equal(seen[epoch * n : (epoch + 1) * n].sort().values, torch.arange(n))
    assert not torch.equal(seen[:n], seen[n : 2 * n])


def test_train_and_test_are_disjoint_and_complete(digits):
    test = Digits("test")
    assert len(digits) == 1500 and len(test) == 297
    together = torch.cat([digits.images, test.images]).flatten(1)
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().data).float()
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, raw.tolist()))
    with pytest.raises(ValueError, match="'valid'"):
        Digits("valid")


def test_flow_matching_by_hand(digits):
    batch = digits.batch(0, 0, 4)
    t = batch.t[1].item()
    torch.testing.assert_close(batch.x_t[1], (1 - t) * batch.x0[1] + t * batch.noise[1])
    torch.testing.assert_close(batch.x_t + (0 - batch.t)[:, None, None] * batch.velocity, batch.x0)
    torch.testing.assert_close(batch.velocity, batch.noise - batch.x0)
    assert batch.inputs()["hidden_states"].shape == (4, 16, 4)


def test_patchify_is_row_major_and_invertible(digits):
    image = torch.arange(64.0).reshape(1, 8, 8)
    tokens = patchify(image)
    assert tokens[0, 0].tolist() == [0, 1, 8, 9] and tokens[0, 1].tolist() == [2, 3, 10, 11]
    assert torch.equal(unpatchify(tokens), image)
    torch.testing.assert_close(digits.to_images(digits.latents[:5]) * 16, digits.images[:5])
    assert digits.img_ids[5].tolist() == [0, 1, 1]  # token 5: row 1, column 1


def test_timesteps():
    for kind in ("uniform", "logit-normal"):
        t = sample_timesteps(4096, generator(0, "test"), kind)
        assert 0 < t.min() and t.max() < 1 and abs(t.mean() - 0.5) < 0.02
    assert t.std() < 0.25  # logit-normal is more concentrated than uniform's 0.289
    with pytest.raises(ValueError, match="'cosine'"):
        sample_timesteps(1, generator(0, "test"), "cosine")


def test_flux_shift_by_hand():
    """t' = e^mu / (e^mu + 1/t - 1) of a logit-normal t, mu 0.5 at 256 and 1.15 at 4096 tokens."""
    assert flux_shift(256) == pytest.approx(0.5) and flux_shift(4096) == pytest.approx(1.15)
    assert flux_shift(1024) == pytest.approx(0.63)
    plain = sample_timesteps(64, generator(0, "test"), "logit-normal")
    for tokens in (256, 1024, 4096):
        e = math.exp(flux_shift(tokens))
        shifted = sample_timesteps(64, generator(0, "test"), "flux-shift", image_tokens=tokens)
        torch.testing.assert_close(shifted, e / (e + 1 / plain - 1))
    pipeline = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    assert flux_shift(777) == pytest.approx(pipeline.calculate_shift(777))
    with pytest.raises(ValueError, match="image_tokens"):
        sample_timesteps(1, generator(0, "test"), "flux-shift")


def test_a_step_distilled_teacher_sees_its_own_noise_levels_alone():
    grid = [1.0, 0.75, 0.5, 0.25]
    t = sample_timesteps(4000, generator(0, "test"), "grid", grid=grid)
    assert sorted(set(t.tolist()), reverse=True) == grid
    assert all(abs((t == level).float().mean() - 0.25) < 0.03 for level in grid)
    for wrong in (None, [], [0.0], [1.5]):
        with pytest.raises(ValueError, match="grid"):
            sample_timesteps(1, generator(0, "test"), "grid", grid=wrong)


def test_sampler_integrates_the_velocity(digits):
    """With v = noise - x0 for a fixed x0, Euler is exact and ends at x0."""
    pytest.importorskip("diffusers")
    from distill.sampling import sample

    noise = digits.noise_batch(0, 1)
    target = digits.latents[:10]
    times = []

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, hidden_states, timestep, encoder_hidden_states, **_):
            times.append(timestep[0].item())
            # x_t = x0 + t v, so the velocity at (x_t, t) is (x_t - x0) / t
            return SimpleNamespace(sample=(hidden_states - target) / timestep[:, None, None])

    out = sample(Exact(), noise, steps=4)
    torch.testing.assert_close(out, target, rtol=1e-4, atol=1e-4)
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_same_noise_for_every_model(digits):
    assert equal(digits.noise_batch(5, 2), Digits("test").noise_batch(5, 2))
    assert digits.noise_batch(5, 2).labels.tolist() == [d for d in range(10) for _ in range(2)]
