"""Icons as data: the splits, what a prompt is, and the glyphs; and the teacher trained on them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch

pytest.importorskip("PIL")
if find_spec("qtawesome") is None:
    pytest.skip("needs QtAwesome", allow_module_level=True)

from helpers.batches import equal

from distill.data import icons as data
from distill.data.icons import FONTS, Icons, read_charmap, split_names, word_code
from distill.errors import UserError


@pytest.fixture(scope="module")
def icons():
    return Icons("train", fonts=["fa"])


def test_splits_cover_all_icons_once_and_keep_pairs_of_words_apart():
    names = [(font, name) for font in FONTS for name, _ in read_charmap(font)]
    assert len(names) > 15_000 and len(set(names)) == len(names)
    of = {s: [n for n, own in zip(names, split_names(names), strict=True) if own == s]
          for s in Icons.splits}  # fmt: skip
    assert sum(map(len, of.values())) == len(names) and min(map(len, of.values())) > 300
    pairs = {frozenset(p) for _, name in of["train"] for p in combinations(name.split("-"), 2)}
    words = {w for _, name in of["train"] for w in name.split("-")}
    for _, name in of["combinations"]:
        own = name.split("-")
        assert words.issuperset(own), name
        assert any(frozenset(p) not in pairs for p in combinations(own, 2)), name


def test_an_icon_stays_in_its_split_whatever_fonts_are_used():
    alone = {n for n in Icons("test", fonts=["fa"]).names}
    with_others = {n for n in Icons("test", fonts=["fa", "remix"]).names if n[0] == "fa"}
    # an icon moves from "test" to "combinations" if another font teaches its word, never to "train"
    assert with_others <= alone
    assert not alone & {n for n in Icons("train", fonts=["fa", "remix"]).names}


def test_word_codes_are_the_same_everywhere():
    assert word_code("cat")[:16].tolist() == [
        1 - 2 * (byte >> bit & 1 ^ 1) for byte in CAT for bit in range(8)
    ]
    assert set(word_code("cat").tolist()) == {-1.0, 1.0}
    assert abs(float(word_code("cat") @ word_code("dog"))) < 48


CAT = bytes.fromhex("c28c")


def test_prompts(icons):
    number, name = next((i, n) for i, n in enumerate(icons.names) if len(n) > 2)
    text, pooled = icons.prompts(torch.tensor([number, -1])).values()
    font, *rest = name
    words = icons.asked([" ".join(name), " ".join([font, *reversed(rest)])], seed=0)
    assert torch.equal(words.text[0], text[0]) and torch.equal(words.pooled[0], pooled[0])
    assert not torch.equal(words.text[1], text[0])  # the order of words is seen in the text
    assert torch.allclose(words.pooled[1], pooled[0], atol=1e-6)
    assert not text[1].any() and not pooled[1].any()  # the empty prompt
    assert torch.equal(icons.asked(["fa-Circle"], 0).text, icons.asked(["fa circle"], 0).text)
    assert data.whole_prompt("Folder-star") == "mdi folder star"
    long = icons.asked(["fa " + "word " * 20], 0)
    assert long.text.shape == (1, icons.text_tokens, icons.text_dim) and long.text.isfinite().all()


def test_batches(icons):
    batch = icons.batch(3, 7, 12)
    assert batch.x0.shape == (12, 64, 16) and batch.text.shape == (12, 8, 128)
    assert equal(batch, icons.batch(3, 7, 12))
    assert equal(batch[2:5], icons.batch(3, 7, 12, rows=slice(2, 5)))
    assert not torch.equal(batch.noise, icons.batch(3, 7, 12, "test").noise)
    epoch = torch.cat([icons.batch(0, s, 100).labels for s in range(len(icons) // 100)])
    assert len(epoch.unique()) == len(epoch)


def test_dropout_gives_the_empty_prompt_to_its_share():
    some = Icons("train", fonts=["fa"], dropout=0.25).batch(0, 0, 1000)
    plain = Icons("train", fonts=["fa"]).batch(0, 0, 1000)
    empty = some.labels == -1
    assert 200 < int(empty.sum()) < 300
    assert not some.text[empty].any() and torch.equal(some.text[~empty], plain.text[~empty])
    assert torch.equal(some.x0, plain.x0)


def test_glyphs(icons):
    pictures = icons.to_images(icons.latents)
    assert pictures.shape == (len(icons), 32, 32)
    assert pictures.min() == 0 and pictures.max() == 1
    ink = 1 - pictures.mean((1, 2))
    assert ink.min() > 0.005 and 0.2 < ink.mean() < 0.6  # none is blank
    names = {" ".join(n): i for i, n in enumerate(icons.names)}
    square = pictures[names["fa square"]]
    assert square[8:24, 8:24].max() == 0 and square[0].min() == 1


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"fonts are \['serif'\]; expected some of .*'mdi'"):
        Icons(fonts=["serif"])
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as err:
        read_charmap("mdi")
    assert err.value.name == "qtawesome"


RUN = """
data: {name: icons, fonts: [fa]}
teacher:
  num_layers: 1
  num_single_layers: 1
  heads: 2
  head_dim: 8
  rope: [4, 2, 2]
  train: {steps: STEPS, batch_size: 4, lr: 1.0e-3, log_every: 1, preview_every: 2}
"""


@pytest.mark.slow
def test_teacher_command(tmp_path, capsys):
    pytest.importorskip("diffusers")
    from safetensors.torch import load_file

    from d2m_models.checkpoints.load import load_flux
    from distill.cli import main

    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(RUN.replace("STEPS", "2"))
    assert main(["teacher", str(config), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out / 'model'}\n"
    model = load_flux(out / "model")
    saved = load_file(out / "model" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float16}
    (row,) = map(json.loads, (out / "held-out.jsonl").read_text().splitlines())
    assert row.pop("step") == 2 and set(row) == set(Icons.splits)
    assert all(0 < loss < 4 for loss in row.values())
    assert [p.name for p in (out / "previews").iterdir()] == ["step-0000002.png"]

    config.write_text("start: " + str(out / "model") + RUN.replace("STEPS", "1"))
    again = tmp_path / "again"
    assert main(["teacher", str(config), "--out", str(again)]) == 0
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(),
             load_flux(again / "model").parameters(), strict=True)]  # fmt: skip
    assert 0 < max(moved) < 2e-3  # one step of Adam from where the first ended

    config.write_text("teacher: {path: x}\ndata: {name: icons}")
    assert main(["teacher", str(config)]) == 2
    assert "needs teacher.train" in capsys.readouterr().err


@pytest.mark.slow
def test_the_teacher_that_comes_with_the_package(monkeypatch, tmp_path):
    """It knows the icons: far nearer the data than the mean is, on what it never saw as well."""
    pytest.importorskip("diffusers")
    from distill import teacher as module
    from distill.configs.sections import DataConfig, TeacherConfig
    from distill.data.batch import held_out_batch
    from distill.errors import CheckpointError
    from distill.importance import flow_matching_loss

    config, data_config = TeacherConfig(path="icons"), DataConfig(name="icons")
    model = module.load_teacher(config, data_config, 0)
    for split in Icons.splits:
        batch = held_out_batch(Icons(split), 96, 0)
        with torch.no_grad():
            loss = float(flow_matching_loss(model, batch))
        assert loss < 0.3 < 0.5 * float(batch.velocity.var()), split
    (tmp_path / "icons").mkdir()
    monkeypatch.chdir(tmp_path)
    assert module.find_teacher("icons") == "icons"  # one's own folder comes first
    monkeypatch.chdir("/")
    monkeypatch.setattr(module.hashlib, "sha256", lambda b: module.hashlib.md5(b))
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is another"):
        module.find_teacher("icons")
