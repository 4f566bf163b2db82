"""Tiny random judges of the real architectures, saved and read by the real loading code, against
what the library computes itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("diffusers", "transformers", "PIL", "skimage"):
    pytest.importorskip(package)

from helpers import tiny_judges as tiny
from helpers.flux_folder import draw

from distill.errors import UserError
from distill.evaluate import compbench, dpg, fidelity, geneval, rewards
from distill.evaluate.judges import Blip, Chat, Clip, Detection, Detector, Item, Judges
from distill.evaluate.prompts import Prompt

CPU = torch.device("cpu")
IMAGE = draw(48, 64, 0)


def items(folder, *prompts, other=None):
    """An image a prompt, in a folder as `generate` leaves it."""
    (folder / "images").mkdir(exist_ok=True)
    for i in range(len(prompts)):
        draw(40, 40, i).save(folder / "images" / f"{i:05d}-0.png")
    return [Item(f"{i:05d}-0", prompt, folder, other) for i, prompt in enumerate(prompts)]


def judges(metric, **names):
    return Judges(metric, {role: str(name) for role, name in names.items()})


# --- scores


def test_clip_score_is_transformers_own(tmp_path):
    """Logits per image over exp(logit scale) are cosines; the score is 100 of them, at least 0."""
    from transformers import CLIPModel, CLIPProcessor

    folder = tiny.clip(tmp_path / "clip")
    images = items(tmp_path, Prompt("a red cat"), Prompt("a blue dog"), Prompt("a dog " * 20))
    used = judges("clip", model=folder)
    found = rewards.clip_score(images, used)["clip"]
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=[i.open() for i in images], text=[i.prompt.text for i in images],
                       return_tensors="pt", padding="max_length", truncation=True,
                       max_length=16)  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diag() / model.logit_scale.exp()
    expected = (100 * logits).clamp(min=0).tolist()
    assert [found[i.key] for i in images] == pytest.approx(expected, abs=1e-3)
    assert used.used["model"]["judge"] == str(folder) and used.used["model"]["weights"]


def test_image_reward(tmp_path):
    """Weights under ImageReward's own names give what BLIP gives that holds them."""
    from transformers import AutoTokenizer, BlipImageProcessor

    folder, model = tiny.image_reward(tmp_path / "judge")
    [item] = items(tmp_path, Prompt("a red cat"))
    used = judges("image-reward", model=folder, tokenizer=folder)
    found = rewards.image_reward([item], used)["image_reward"][item.key]
    tokens = AutoTokenizer.from_pretrained(folder)("a red cat", return_tensors="pt")
    pixels = BlipImageProcessor(size={"height": 32, "width": 32})(item.open(), return_tensors="pt")
    with torch.no_grad():  # without padding, which the attention mask hides
        seen = model.vision_model(pixels["pixel_values"]).last_hidden_state
        read = model.text_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"],
                                  encoder_hidden_states=seen).last_hidden_state  # fmt: skip
        reward = float(model.mlp(read[:, 0]))
    assert found == pytest.approx((reward - 0.16717362830052426) / 1.0333394966054072, abs=1e-5)


def test_image_reward_of_another_checkpoint(tmp_path):
    folder, _ = tiny.image_reward(tmp_path / "judge")
    state = torch.load(folder / "ImageReward.pt")
    del state["blip.visual_encoder.cls_token"]
    torch.save(state, folder / "ImageReward.pt")
    with pytest.raises(UserError, match="class_embedding.*--judge image-reward.model=FOLDER"):
        rewards.image_reward([], judges("image-reward", model=folder, tokenizer=folder))


def test_square_is_torchvisions_resize_and_crop():
    image = rewards.square(draw(30, 61, 0), 20)
    assert image.size == (20, 20)
    assert rewards.square(draw(20, 20, 0), 20).tobytes() == draw(20, 20, 0).tobytes()


def plain_cross(x, context, mask, state, layers=2, heads=3, head=4):
    """MPS's cross model head by head and token by token."""
    norm = lambda h, w: torch.nn.functional.layer_norm(h, h.shape[-1:], w)  # noqa: E731

    def swiglu(h):
        a, gate = h.chunk(2, -1)
        return torch.nn.functional.silu(gate) * a

    def turn(vector, position):
        out = vector.clone()
        half = head // 2
        for i in range(half):
            angle = torch.tensor(position / 10000 ** (2 * i / head))
            a, b = vector[i], vector[i + half]
            out[i] = a * angle.cos() - b * angle.sin()
            out[i + half] = b * angle.cos() + a * angle.sin()
        return out

    for layer in range(layers):
        w = lambda n: state[f"layers.{layer}.{n}.weight"]  # noqa: B023, E731
        h = norm(x, w("0.fn.norm"))
        k, v = (context @ w("0.fn.to_kv").T).chunk(2, -1)
        q = h @ w("0.fn.to_q").T
        parts = [
            (q[..., i * head : (i + 1) * head] @ k.T / head**0.5 + mask).softmax(-1) @ v
            for i in range(heads)
        ]
        x = x + torch.cat(parts, -1) @ w("0.fn.to_out").T + swiglu(h @ w("0.fn.ff.0").T) @ w(
            "0.fn.ff.2").T  # fmt: skip
        h = norm(x, w("1.fn.norm"))
        q, k, v, ff = (h @ w("1.fn.fused_attn_ff_proj").T).split(
            [heads * head, head, head, len(w("1.fn.fused_attn_ff_proj")) - (heads + 2) * head], -1
        )
        k = torch.stack([turn(row, n) for n, row in enumerate(k)])
        parts = []
        for i in range(heads):
            qi = torch.stack([turn(r, n) for n, r in enumerate(q[:, i * head : (i + 1) * head])])
            parts.append((qi @ k.T / head**0.5).softmax(-1) @ v)
        x = x + torch.cat(parts, -1) @ w("1.fn.attn_out").T + swiglu(ff) @ w("1.fn.ff_out.1").T
    return x


def test_mps(tmp_path):
    from safetensors.torch import load_file
    from transformers import CLIPModel, CLIPProcessor

    folder = tiny.mps(tmp_path / "judge")
    [item] = items(tmp_path, Prompt("a red cat"))
    used = judges("mps", model=folder / "mps.safetensors", clip=folder)
    found = rewards.mps([item], used)["mps"][item.key]
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    state = {k.removeprefix("cross_model."): v
             for k, v in load_file(folder / "mps.safetensors").items()}  # fmt: skip

    def read(text):
        ids = processor.tokenizer(text, max_length=16, padding="max_length", truncation=True,
                                  return_tensors="pt").input_ids  # fmt: skip
        out = model.text_model(ids)
        return model.text_projection(out.last_hidden_state)[0], model.text_projection(
            out.pooler_output)[0]  # fmt: skip

    with torch.no_grad():
        pixels = processor(images=item.open(), return_tensors="pt")["pixel_values"]
        seen = model.visual_projection(model.vision_model(pixels).last_hidden_state)[0]
        tokens, text = read("a red cat")
        near = (tokens @ read(rewards.MPS.CONDITION)[0].T).amax(1)
        mask = torch.where(near / near.max() > 0.01, 0.0, -torch.inf)
        image = plain_cross(seen, tokens, mask, state)[0]
        expected = model.logit_scale.exp() * torch.cosine_similarity(text, image, dim=0)
    assert found == pytest.approx(float(expected), abs=1e-3)


def test_mps_as_published_is_a_pickled_module(tmp_path):
    folder = tiny.clip(tmp_path / "clip")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "MPS_overall_checkpoint.pth")
    used = judges("mps", model=tmp_path / "MPS_overall_checkpoint.pth", clip=folder)
    with pytest.raises(UserError, match=r"state_dict\(\), NEW\); then say --judge mps.model=NEW"):
        rewards.mps([], used)


# --- detectors and answers


def test_mask2former_detections_are_its_processors(tmp_path):
    detector = Detector(str(tiny.mask2former(tmp_path / "judge")), CPU)
    found = detector(IMAGE, [], 0.05)
    assert found and [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    for d in found:
        rows, columns = np.nonzero(d.mask)
        assert d.mask.shape == (48, 64) and d.label in ("cat", "dog", "bench")
        assert d.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert detector(IMAGE, [], 0.99) == []


def test_owl_looks_for_names(tmp_path):
    detector = Detector(str(tiny.owl(tmp_path / "judge")), CPU)
    found = detector(IMAGE, ["cat", "dog"], 0.0)
    assert found and {d.label for d in found} <= {"cat", "dog"}


def test_blip_yes_is_its_decoders_first_token(tmp_path):
    judge = Blip(str(tiny.blip_vqa(tmp_path / "judge")), CPU)
    inputs = judge.processor(images=IMAGE, text="a red cat?", return_tensors="pt")
    config = judge.model.config.text_config
    inputs["input_ids"][:, 0] = config.vocab_size - 1  # [ENC]
    start = torch.tensor([[config.bos_token_id]])  # [DEC]
    with torch.no_grad():
        seen = judge.model.vision_model(inputs["pixel_values"])[0]
        asked = judge.model.text_encoder(inputs["input_ids"], encoder_hidden_states=seen)[0]
        logits = judge.model.text_decoder(start, encoder_hidden_states=asked).logits
    yes, no = logits[0, 0].softmax(0)[judge.processor.tokenizer(
        "yes no", add_special_tokens=False)["input_ids"]].tolist()  # fmt: skip
    assert judge.yes(IMAGE, "a red cat?") == pytest.approx(yes / (yes + no), abs=1e-6)
    assert isinstance(judge.answer(IMAGE, "a red cat?"), str)


def test_chat(tmp_path):
    judge = Chat(str(tiny.llava(tmp_path / "judge")), CPU)
    first = judge.talk(IMAGE, ["a cat"], 3)
    assert first == judge.talk(IMAGE, ["a cat"], 3)  # greedy
    assert judge.yes(IMAGE, "a cat?") in (0.0, 1.0)
    assert isinstance(judge.talk(IMAGE, ["a cat", "yes", "a dog ?"], 3), str)


# --- every benchmark from end to end


def test_geneval(tmp_path, monkeypatch):
    clip = tiny.clip(tmp_path / "clip")
    names = {"detector": tiny.mask2former(tmp_path / "detector"), "clip": clip}
    wanted = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    absent = {"include": [{"class": "zebra", "count": 1}]}
    images = items(tmp_path, Prompt("a red cat", "geneval", "colors", wanted),
                   Prompt("a zebra", "geneval", "single_object", absent),
                   Prompt("two cats", "geneval", "counting", wanted))  # fmt: skip
    monkeypatch.setattr(geneval, "THRESHOLD", 0.01)
    found = geneval.score(images, judges("geneval", **names))["geneval"]
    # the tiny judge sees cats under the threshold of colours; nothing is as sure as counting asks
    image = images[0].open()
    seen = Detector(str(names["detector"]), CPU)(image, [], 0.01)
    cats = [d for d in seen if d.label == "cat"][:1]
    colours = geneval.colour_reader(Clip(str(clip), CPU))(image)(cats, "cat")
    assert list(found.values()) == [float(colours == ["red"]), 0, 0]


def test_colour_of_an_object_is_clips_best(tmp_path):
    """Of a classifier whose text features are the image features of coloured squares."""
    from PIL import Image

    clip = Clip(str(tiny.clip(tmp_path / "clip")), CPU)
    squares = {c: Image.new("RGB", (32, 32), c) for c in geneval.COLOURS}
    clip.texts = lambda texts: torch.cat([
        clip.images([squares[next(c for c in geneval.COLOURS if c in t)]]) for t in texts
    ])  # fmt: skip
    scene = Image.new("RGB", (64, 32), "blue")
    scene.paste(squares["red"], (0, 0))
    mask = np.zeros((32, 64), bool)
    mask[:, :32] = True
    found = [Detection("cat", 0.9, (0, 0, 32, 32), mask), Detection("cat", 0.8, (32, 0, 64, 32))]
    assert geneval.colour_reader(clip)(scene)(found, "cat") == ["red", "blue"]
    half = geneval.cut(scene, Detection("cat", 0.9, (0, 0, 64, 32), mask))
    assert half.getpixel((50, 5)) == (0x99, 0x99, 0x99) and half.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["blip_vqa", "llava"])
def test_dpg(tmp_path, kind):
    questions = {1: ("a cat?", []), 2: ("a red cat?", [1])}
    images = items(tmp_path, Prompt("a red cat", "dpg", None, {"questions": questions}))
    folder = getattr(tiny, kind)(tmp_path / "judge")
    found = dpg.score(images, judges("dpg", vqa=folder))["dpg"]
    assert found["00000-0"] in (0, 50, 100)


def test_compbench(tmp_path):
    meta = {"phrases": ["a red cat", "a dog"], "objects": ["cat", "dog"], "counts": [[2, "cat"]]}
    groups = ("color", "spatial", "3d_spatial", "numeracy", "complex")
    text = "a red cat in front of a dog on the left of it"
    images = items(tmp_path, *(Prompt(text, "t2i-compbench", group, meta) for group in groups))
    made = {"vqa": tiny.blip_vqa, "detector": tiny.mask2former, "depth": tiny.depth,
            "vlm": tiny.llava}  # fmt: skip
    names = {role: str(make(tmp_path / role)) for role, make in made.items()}
    found = compbench.score(images, judges("t2i-compbench", **names))
    judge = Blip(names["vqa"], CPU)
    product = judge.yes(images[0].open(), "a red cat?") * judge.yes(images[0].open(), "a dog?")
    assert found["b_vqa"] == {"00000-0": pytest.approx(product)}
    assert list(found["unidet"]) == ["00001-0", "00002-0", "00003-0"]
    assert found["s_cot"]["00004-0"] in (20, 40, 60, 80, 100)
    without = judges("t2i-compbench", **{k: v for k, v in names.items() if k != "vlm"})
    assert set(compbench.score(images, without)) == {"b_vqa", "unidet"}


def test_features_of_a_vision_model_alone(tmp_path):
    """DINOv2 has no text; cosine and the sets' distances come from its pooled output."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1,
                          image_size=28, patch_size=14)  # fmt: skip
    Dinov2Model(config).save_pretrained(tmp_path / "judge")
    side = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=side).save_pretrained(
        tmp_path / "judge"
    )
    folder = Path(tmp_path)
    images = items(folder, Prompt("a"), Prompt("b"), other=folder)
    found = fidelity.score(images, judges("fidelity", features=tmp_path / "judge"))
    assert found["cosine"] == {i.key: pytest.approx(1) for i in images}
    assert fidelity.sets(found["features"]) == pytest.approx({"cmmd": 0, "fid": 0}, abs=1e-4)
    assert set(found) == {"psnr", "ssim", "cosine", "features"}


# --- what is missing


def test_a_judge_that_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load the judge .*say --judge clip.model=FOLDER"):
        rewards.clip_score([], judges("clip", model=tmp_path / "empty"))
    with pytest.raises(UserError, match=r"clip: give the judge with --judge clip.model=NAME"):
        rewards.clip_score([], Judges("clip", {"model": None}))


def test_a_package_that_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"'open_clip' is missing; pip install 'dense2moe\[eval"):
        rewards.clip_score([], judges("clip", model="open_clip:ViT-B-32/openai"))
    monkeypatch.setitem(sys.modules, "spacy", None)
    compbench._parser.cache_clear()
    with pytest.raises(UserError, match="pip install spacy"):
        compbench.phrases(Prompt("a red cat"))
