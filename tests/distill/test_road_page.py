"""docs/models.md from FLUX.1 [dev] on disk to an image: its first page, line by line, in small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from helpers.flux_folder import flux_folder, image_folder
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text().split("\n## ")[1]
STRUCTURE = {"dense_double_blocks": [], "num_layers": 1, "num_single_layers": 4}
# what is smaller here than on the page
SMALL = {
    "--preset flux-moe-l": "--structure structure.yaml",
    "flux-moe-l-1x141gb.yaml": "tiny.yaml",
    "--size 1024 --steps 28": "--size 64 --steps 2",
    "--model FLUX.1-dev": "--model FLUX.1-dev --size 64 --device cpu",
    "-o all.png": "-o all.png --size 64 --steps 2",
}


def lines():
    """The page's commands, in small, as arguments of `d2m`."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    found = []
    for line in block.splitlines():
        for big, small in SMALL.items():
            line = line.replace(big, small)
        found.append(shlex.split(line, comments=True))
    assert found[0] == ["pip", "install", ".[all]"]
    assert all(words[0] == "d2m" for words in found[1:]) and len(found) > 5
    return [words[1:] for words in found[1:]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the page is read: FLUX.1-dev, photos, and a small configuration."""
    path = tmp_path_factory.mktemp("page")
    flux_folder(path / "FLUX.1-dev", guidance=True)
    image_folder(path / "photos", count=12)
    (path / "structure.yaml").write_text(yaml.safe_dump(STRUCTURE))
    train = {"steps": 1, "batch_size": 2, "lr": 1e-3}
    data = {"name": "shards", "folder": "latents", "text_encoders": "FLUX.1-dev"}
    config = {
        "out": "run", "teacher": {"path": "FLUX.1-dev"}, "student": {"structure": STRUCTURE},
        "data": data, "stages": [{"stage": "moe", "train": train}],
    }  # fmt: skip
    config["student"] |= {"importance_batches": 1, "importance_rows": 2, "calibration": 32}
    (path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.mark.long
def test_every_line_of_the_page(place, monkeypatch, capfd):
    from distill.cli import main

    monkeypatch.chdir(place)
    for words in lines():
        assert main(words) == 0, (words, capfd.readouterr().err[-2000:])
    for name in ("all.png", "cat.png"):
        assert Image.open(place / name).size == (64, 64)
    card = (place / "distilled" / "model" / "README.md").read_text()
    assert "Distilled from the dense model" in card and "| stage moe | steps 1" in card
    # each python block in a process of its own, as on the page one after the other
    blocks = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        small = block.replace('"a cat"', '"a cat", height=64, width=64, num_inference_steps=2')
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{small}"
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=place, capture_output=True, text=True,
            env={**os.environ, "HF_MODULES_CACHE": str(place / "modules")},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
    assert Image.open(place / "cat-too.png").size == (64, 64)
