"""The photographs source: the batch protocol, the split, and what a token is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("PIL")

from helpers.batches import equal

from distill.data.digits import patchify, unpatchify
from distill.data.photos import PICTURES, Photos, read_picture


@pytest.fixture(scope="module")
def photos():
    return Photos("train")


def test_shapes(photos):
    batch = photos.batch(0, 0, 20)
    assert batch.x0.shape == batch.noise.shape == (20, 64, 48)
    assert batch.text.shape == (20, 4, 32) and batch.pooled.shape == (20, 32)
    assert batch.img_ids.shape == (64, 3) and batch.txt_ids.shape == (4, 3)
    assert batch.x0.min() >= -1 and batch.x0.max() <= 1
    assert ((batch.t > 0) & (batch.t < 1)).all()
    # whole rounds of all prompts
    assert batch.labels[:16].sort().values.tolist() == list(range(len(PICTURES)))


def test_a_batch_depends_on_its_arguments_alone(photos):
    batch = photos.batch(3, 7, 12, "test")
    assert equal(batch, Photos("train").batch(3, 7, 12, "test"))
    for other in ((4, 7, 12, "test"), (3, 8, 12, "test"), (3, 7, 12, "train")):
        changed = photos.batch(*other)
        assert not torch.equal(batch.noise, changed.noise)
        assert not torch.equal(batch.x0, changed.x0)


@pytest.mark.parametrize("rows", [slice(0, 5), slice(5, 12), slice(11, 12), slice(4, 4)])
def test_rows_are_those_of_the_whole_batch(photos, rows):
    whole, part = photos.batch(1, 2, 12), photos.batch(1, 2, 12, rows=rows)
    assert equal(whole[rows], part)


def test_grid(photos):
    grid = [1.0, 0.75, 0.5, 0.25]
    t = Photos("train", "grid", grid).batch(0, 0, 64).t
    assert set(t.tolist()) == set(grid)


def test_prompts_do_not_depend_on_seed_or_split(photos):
    a, b = photos.batch(0, 0, 16), Photos("test").batch(5, 1, 16)
    order_a, order_b = a.labels.argsort(), b.labels.argsort()
    assert torch.equal(a.text[order_a], b.text[order_b])
    assert torch.equal(a.pooled[order_a], b.pooled[order_b])


def test_train_and_test_share_no_pixel(photos):
    test = Photos("test")
    for name, file, left, right in zip(
        PICTURES, PICTURES.values(), photos.pictures, test.pictures, strict=True
    ):
        whole = read_picture(file)
        assert torch.equal(torch.cat([left, right], 1), whole), name
        assert min(right.shape[:2]) >= Photos.side, name


def test_a_crop_is_in_its_picture(photos):
    batch = photos.batch(0, 3, 4)
    image = unpatchify(batch.x0, Photos.patch)[0]
    picture = photos.pictures[int(batch.labels[0])]
    windows = picture.unfold(0, 32, 1).unfold(1, 32, 1)  # [y, x, 3, 32, 32]
    corner = (windows[..., 0, 0] == image[0, 0]).all(-1) & (
        windows[..., 31, 31] == image[31, 31]
    ).all(-1)
    found = windows[corner].permute(0, 2, 3, 1)
    assert any(torch.equal(window, image) for window in found)


def test_tokens_and_pixels_are_inverse():
    images = torch.arange(2 * 8 * 8 * 3, dtype=torch.float32).view(2, 8, 8, 3)
    tokens = patchify(images, 4)
    assert tokens.shape == (2, 4, 48)
    assert torch.equal(tokens[0, 1], images[0, :4, 4:].reshape(-1))  # row-major
    assert torch.equal(unpatchify(tokens, 4), images)


def test_images(photos):
    images = photos.to_images(photos.batch(0, 0, 2).x0)
    assert images.shape == (2, 32, 32, 3) and 0 <= images.min() and images.max() <= 1


def test_noise_batch(photos):
    noise = photos.noise_batch(0, 2)
    assert noise.labels.bincount().tolist() == [2] * 16 and (noise.t == 1).all()
    assert torch.equal(noise.x_t, noise.noise)


def test_unknown_split():
    with pytest.raises(ValueError, match="split is 'val'"):
        Photos("val")
