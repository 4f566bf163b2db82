"""Our encoders against diffusers' FluxPipeline on the same tiny folder."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from helpers.flux_folder import LENGTH, POOLED_DIM, TEXT_DIM, draw, flux_folder

from distill.data.batch import generator, image_ids
from distill.data.encode import LatentEncoder, TextEncoder, pack, text_sizes, unpack
from distill.errors import UserError
from distill.prepare.buckets import fit
from distill.prepare.colour import to_srgb

CAPTIONS = ["a photo of red cat", "blue sky", "", "a dog on white house of green tree and red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe(folder):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(folder)


def test_pack_and_ids_are_the_pipelines(pipe):
    latents = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(latents), pipe._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(pack(latents), 3), latents)
    ids = pipe._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(image_ids(3, 5), ids)


def test_prompts_are_the_pipelines(folder, pipe):
    ours = TextEncoder(str(folder), dtype="float32", length=LENGTH)
    text, pooled = ours.encode(CAPTIONS)
    want_text, want_pooled, txt_ids = pipe.encode_prompt(CAPTIONS, max_sequence_length=LENGTH)
    torch.testing.assert_close(text, want_text)
    torch.testing.assert_close(pooled, want_pooled)
    assert text.shape == (4, LENGTH, TEXT_DIM) and txt_ids.shape == (LENGTH, 3)
    assert text_sizes(str(folder)) == (TEXT_DIM, POOLED_DIM) == (ours.text_dim, ours.pooled_dim)
    assert not torch.allclose(text[0], text[1]) and not torch.allclose(pooled[0], pooled[1])


def test_an_embedding_does_not_depend_on_the_batch(folder):
    ours = TextEncoder(str(folder), dtype="bfloat16", length=LENGTH)
    text, pooled = ours.encode(CAPTIONS)
    assert text.dtype == torch.bfloat16
    for i, caption in enumerate(CAPTIONS):
        alone = ours.encode([caption])
        assert torch.equal(alone[0][0], text[i]) and torch.equal(alone[1][0], pooled[i])


def test_autocast_around_them_changes_nothing(folder):
    text, vae = TextEncoder(str(folder), dtype="float32", length=LENGTH), LatentEncoder(str(folder))
    pixels = torch.from_numpy(fit(draw(64, 64, 1), (64, 64)))[None]

    def everything():
        latents = vae.encode(pixels)
        return *text.encode(CAPTIONS[:1]), latents, vae.decode(latents, 4)

    plain = everything()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(plain, cast, strict=True))


def test_latents_are_the_vaes(folder, pipe):
    image = draw(64, 96, 0)
    pixels = torch.from_numpy(fit(to_srgb(image)[0], (64, 96)))[None]
    ours = LatentEncoder(str(folder)).encode(pixels)
    x = pipe.image_processor.preprocess(image, 64, 96)
    z = pipe.vae.encode(x).latent_dist.mode()
    want = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(ours, pipe._pack_latents(want, 1, 4, 8, 12))
    assert ours.shape == (1, 4 * 6, 16)
    # and back: the pipeline's own way from tokens to the VAE's decoder
    back = pipe._unpack_latents(ours, 64, 96, pipe.vae_scale_factor)
    back = back / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    torch.testing.assert_close(back, z)


def test_latents_become_the_pipelines_images(folder, pipe):
    tokens = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    z = pipe._unpack_latents(tokens, 64, 96, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    want = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type="pt")
    torch.testing.assert_close(LatentEncoder(str(folder)).decode(tokens, 4), want)


def test_a_drawn_latent_is_a_function_of_its_generator(folder):
    encoder = LatentEncoder(str(folder))
    pixels = torch.from_numpy(fit(draw(64, 64, 1), (64, 64)))[None].repeat(2, 1, 1, 1)
    mode = encoder.encode(pixels)
    drawn = encoder.encode(pixels, [generator(0, "sample", i) for i in (3, 4)])
    again = encoder.encode(pixels, [generator(0, "sample", i) for i in (4, 3)])
    assert torch.equal(drawn[0], again[1]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(mode[0], mode[1]) and not torch.equal(mode[0], drawn[0])


def test_fingerprints_tell_weights_apart(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    first = LatentEncoder(str(folder)).fingerprint
    assert LatentEncoder(str(folder)).fingerprint == first
    import shutil

    shutil.copytree(folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"][0] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    assert LatentEncoder(str(tmp_path)).fingerprint != first


@pytest.mark.parametrize("model", ["no/such/folder", "./nowhere", "{folder}/vae"])
def test_what_is_missing_is_named(folder, model):
    with pytest.raises(UserError, match="expected"):
        LatentEncoder(model.format(folder=folder))
