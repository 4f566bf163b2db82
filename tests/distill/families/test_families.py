"""Every family end to end on a tiny pipeline: prepare, convert, the stages, save, load, sample."""

import functools
import inspect
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

from helpers.flux_folder import image_folder
from helpers.tiny_pipelines import MAKERS, pipeline_folder
from safetensors.torch import load_file

from d2m_models import load_pipeline, moe_layers, set_top_k
from d2m_models.checkpoints.load import load_dense
from d2m_models.config import AnyMoEConfig
from d2m_models.conversion.any_model import convert_any, neuron_places
from distill.cli import main
from distill.configs.sections import DataConfig, TeacherConfig
from distill.data.batch import Batch
from distill.data.encode import PipelineText
from distill.data.sources import open_source
from distill.errors import UserError
from distill.families.packing import pack
from distill.families.pixart import PixArt
from distill.families.registry import family_of, find_family
from distill.importance import flow_matching_loss, taylor_importance
from distill.loop.progress import read_log
from distill.plan.skeleton import teacher_skeleton

# tokens a caption, and the blocks of a group
FAMILIES = {
    "sd3": (6, {"transformer_blocks": [[1, 2]]}),
    "qwen-image": (240, {"transformer_blocks": [[1, 2]]}),
    "pixart": (6, {"transformer_blocks": [[1, 2]]}),
    "z-image": (40, {"layers": [[1, 2]]}),
    "flux2": (40, {"single_transformer_blocks": [[1, 2]]}),
    "wan": (6, {"blocks": [[1, 2]]}),
}
MARKS = {name: "long" if name == "sd3" else "slow" for name in FAMILIES}
MOE = {"activated": 0.5, "num_experts": 6, "top_k": 2}
TRAIN = {"batch_size": 2, "lr": 1e-3, "warmup": 1, "log_every": 1}
WORDS = "a photo of red cat"


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=getattr(pytest.mark, kind)) for n, kind in MARKS.items()],
)
def family(request, tmp_path_factory):
    """(name, folder of its pipeline, folder of latents with embeddings)"""
    path = tmp_path_factory.mktemp(request.param)
    folder = pipeline_folder(request.param, path)
    images, latents = image_folder(path / "images", count=6), path / "latents"
    length = FAMILIES[request.param][0]
    options = ("--size", "64", "--max-upscale", "2", "--text-embeddings", "--device", "cpu")
    options += ("--max-sequence-length", str(length), "--text-precision", "float32")
    assert main(["prepare", str(images), str(latents), "--model", str(folder), *options]) == 0
    return request.param, folder, latents


def data(family, **more):
    name, _, latents = family
    length = FAMILIES[name][0]
    return {"name": "shards", "folder": str(latents), "max_sequence_length": length, **more}


def test_every_tiny_pipeline_is_tried():
    assert set(MAKERS) == set(FAMILIES)


def draw(pipe, **options):
    """The final latents (or pixels) of one short sampling."""
    options = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "pt", **options}
    generator = torch.Generator().manual_seed(3)
    out = pipe(prompt=WORDS, generator=generator, **options)
    return out.images if hasattr(out, "images") else out.frames


def few(name):
    return {"num_frames": 5} if name == "wan" else {}


def test_with_all_experts_the_pipeline_draws_what_it_drew(family):
    name, folder, _ = family
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    dense = draw(pipe, **few(name))
    pipe.transformer = convert_any(pipe.transformer, AnyMoEConfig.from_dict({"moe": MOE}))
    set_top_k(pipe.transformer, "dense")
    torch.testing.assert_close(draw(pipe, **few(name)), dense, rtol=1e-4, atol=1e-5)
    set_top_k(pipe.transformer, 0)
    assert (draw(pipe, **few(name)) - dense).abs().max() > 1e-4


def plain(inputs):
    """A transformer's arguments: text without its padding and its mask, lists as tensors."""
    left_out = ("return_dict", "attention_kwargs", "joint_attention_kwargs", "added_cond_kwargs")
    named = {k: v for k, v in inputs.items() if v is not None and k not in left_out}
    mask = [named.pop(k) for k in list(named) if k.endswith("mask")]
    text = next(k for k in ("cap_feats", "encoder_hidden_states") if k in named)
    rows = named.pop(text)
    kept = [rows[i][mask[0][i].bool()] if mask else rows[i] for i in range(len(rows))]
    latents = next(k for k in ("x", "hidden_states") if k in named)
    named[latents] = torch.stack(list(named[latents]))
    return {**named, text: torch.stack(kept)}


def test_a_teacher_is_asked_what_its_pipeline_asks(family, monkeypatch):
    """The transformer's arguments in the first step of sampling, from pure noise."""
    name, folder, _ = family
    pipe, seen = load_pipeline(folder), []
    pipe.set_progress_bar_config(disable=True)
    batch = open_source(DataConfig(**data(family)), pipe.transformer).batch(0, 0, 1)
    forward = type(pipe.transformer).forward

    @functools.wraps(forward)
    def watch(self, *args, **kwargs):
        bound = inspect.signature(forward).bind(self, *args, **kwargs).arguments
        seen.append({k: v for k, v in bound.items() if k != "self"})
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", watch)
    _, rows, columns = batch.grid
    options = {
        "guidance_scale": 0.0 if name == "z-image" else 1.0,
        "max_sequence_length": FAMILIES[name][0],
    }
    options |= {"num_frames": 1} if name == "wan" else {}
    options |= {"use_resolution_binning": False} if name == "pixart" else {}
    draw(pipe, height=16 * rows, width=16 * columns, **options)
    theirs = plain(seen[0])
    noise = theirs.get("x", theirs.get("hidden_states"))
    if noise.ndim > 3:
        noise = pack(noise.flatten(1, 2) if noise.ndim == 5 else noise)
    encoder = PipelineText(str(folder), batch.family, dtype="float32", length=FAMILIES[name][0])
    text, pooled = encoder.encode([WORDS])
    pure = {"x0": torch.zeros_like(noise), "noise": noise, "t": torch.ones(1)}
    ours = plain(replace(batch, **pure, text=text, pooled=pooled).inputs())
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            value, theirs[key] = value.float(), theirs[key].float().reshape(value.shape)
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=key)


def only_shared_neurons_learned(teacher, student, learned):
    """Those of the experts are the teacher's, bit for bit, after the first stage."""
    dense = teacher.state_dict()
    moved = 0
    for name, layer in moe_layers(student).items():
        order = learned[f"{name}.neuron_order"].long()
        for key, dim, first in neuron_places(name, layer):
            theirs = dense[key].narrow(dim, first, len(order)).index_select(dim, order)
            ours = learned[key].narrow(dim, first, len(order))
            same = (ours == theirs).movedim(dim, 0).flatten(1) if ours.ndim > 1 else ours == theirs
            assert same[layer.shared :].all(), key
            moved += int((~same[: layer.shared]).sum())
    assert moved > 0


def test_from_images_to_a_sample_of_the_student(family, tmp_path):
    name, folder, _ = family
    groups = FAMILIES[name][1]
    config = {
        "out": str(tmp_path / "run"),
        "teacher": {"path": str(folder)},
        "data": data(family, caption_dropout=0.5),
        "student": {"structure": {"moe": MOE, "mob": {"groups": groups}}, "importance_batches": 1},
        "stages": [
            {"stage": stage, "train": {"steps": steps, **TRAIN}}
            for stage, steps in (("shared", 2), ("moe", 2), ("mob", 3))
        ],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["distill", str(path), "--device", "cpu"]) == 0
    run = tmp_path / "run"
    for stage in ("shared", "moe", "mob"):
        log = read_log(run / stage / "log.jsonl")
        assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
        assert all(0 < entry["distill"] < 1e3 for entry in log), stage
    teacher = load_dense(folder)
    pipe = load_pipeline(run / "model")
    assert type(pipe) is type(load_pipeline(folder))
    student = pipe.transformer
    only_shared_neurons_learned(teacher, student, load_file(run / "shared" / "model.safetensors"))
    assert type(student) is type(teacher) and moe_layers(student)
    assert json.loads((run / "model" / "config.json").read_text())["origin"]["state"] == "distilled"
    out = tmp_path / "cat.png"
    options = ("--steps", "1", "--size", "32x48", "--device", "cpu")
    options += ("--frames", "5") if name == "wan" else ()
    assert main(["sample", str(run / "model"), WORDS, "-o", str(out), *options]) == 0
    from PIL import Image

    image = Image.open(out)
    assert image.size[0] / image.size[1] == 1.5
    assert getattr(image, "n_frames", 1) == (5 if name == "wan" else 1)


def test_importance_is_of_the_loss_on_data(family):
    """Eq. (6): the most important neuron, taken out, changes the loss more than the least."""
    _, folder, _ = family
    teacher = load_dense(folder).float()
    batch = open_source(DataConfig(**data(family)), teacher).batch(0, 0, 4, "calibrate")
    structure = AnyMoEConfig.from_dict({"moe": MOE})
    scores = taylor_importance(teacher, [batch], structure)
    student = convert_any(teacher, structure)
    assert set(scores) == set(moe_layers(student))
    assert sum(score.sum() for score in scores.values()) > 0
    set_top_k(student, "dense")
    with torch.no_grad():
        ours, dense = flow_matching_loss(student, batch), flow_matching_loss(teacher, batch)
    torch.testing.assert_close(ours, dense)


def test_a_video_is_frames_of_tokens():
    """Wan on three frames: its layout, and a loss that has a gradient."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, text_dim=8, freq_dim=16, ffn_dim=32,
        num_attention_heads=2, attention_head_dim=12, rope_max_seq_len=16,
    )  # fmt: skip
    family, frames = family_of(model), torch.randn(2, 4, 3, 6, 8)  # [B, c, F, h, w]
    tokens = torch.cat([pack(frames[:, :, f]) for f in range(3)], dim=1)
    none, text = torch.zeros(2, 0), torch.randn(2, 5, 8)
    batch = Batch(
        x0=tokens, noise=torch.randn_like(tokens), t=torch.tensor([0.2, 0.7]), text=text,
        pooled=none, labels=none, img_ids=none, txt_ids=none, grid=(3, 3, 4), family=family,
    )  # fmt: skip
    assert torch.equal(family.latents(batch, tokens), frames)
    loss = flow_matching_loss(model, batch)
    loss.backward()
    assert loss > 0 and model.patch_embedding.weight.grad.abs().sum() > 0


def test_epsilon_is_mixed_as_diffusers_scheduler_mixes_it():
    from diffusers import DDPMScheduler

    family = PixArt({"in_channels": 1})
    x0, noise, t = torch.randn(3, 4, 4), torch.randn(3, 4, 4), torch.tensor([0.0004, 0.5, 1.0])
    none = torch.zeros(3, 0)
    batch = Batch(x0, noise, t, none, none, none, none, none, family=family)
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    assert family.steps(batch).tolist() == [0, 499, 999]
    theirs = scheduler.add_noise(x0, noise, family.steps(batch))
    torch.testing.assert_close(batch.x_t, theirs, rtol=1e-4, atol=1e-5)


def test_what_serves_flux_alone_refuses_others(family, tmp_path, capsys):
    from diffusers import ChromaTransformer2DModel

    with pytest.raises(UserError, match="ChromaTransformer2DModel is of no family"):
        find_family(ChromaTransformer2DModel.__name__)
    name, folder, _ = family
    with pytest.raises(UserError, match="data.name is 'digits', which a .* does not take"):
        open_source(DataConfig(), load_dense(folder))
    with pytest.raises(UserError, match="--plan counts FLUX.1 alone"):
        teacher_skeleton(TeacherConfig(path=str(folder)))
    convert = ["convert", str(folder), str(tmp_path / "moe"), "--preset", "flux-moe-l"]
    assert main([*convert, "--calibrate", "digits", "--device", "cpu"]) == 2
    assert "--calibrate must be a diffusers FluxTransformer2DModel" in capsys.readouterr().err
