"""The `d2m` command: the quick demo from end to end, the other commands, and bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

for package in ("diffusers", "skimage", "matplotlib", "yaml", "safetensors", "tqdm"):
    pytest.importorskip(package)
if find_spec("qtawesome") is None:
    pytest.skip("needs QtAwesome", allow_module_level=True)

from distill.study.demo_page import FIELDS

ROOT = Path(__file__).parents[3]
MODELS = ["teacher", "moe", "prune-mlp", "mob", "prune-depth"]
PICTURES = ("samples.png", "errors.png", "experts.png", "loss.png")


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "D2M_CACHE": str(cache)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def d2m(cache, tmp_path_factory):
    """Run a command in an empty folder; returns the completed process."""
    work = tmp_path_factory.mktemp("work")

    def run(*args, check=True, cwd=work):
        process = subprocess.run(
            [sys.executable, "-m", "distill", *map(str, args)],
            cwd=cwd,
            env=_environment(cache),
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert not check or process.returncode == 0, process.stderr
        return process

    return run


@pytest.fixture(scope="module")
def demo(d2m, tmp_path_factory):
    """The quick demo's output folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    d2m("demo", "--quick", "--out", out, "--device", "cpu")
    return out


def _error(process) -> str:
    """The one line a user sees."""
    assert process.returncode == 2, (process.returncode, process.stderr)
    lines = [line for line in process.stderr.splitlines() if "Warning" not in line and line.strip()]
    assert "Traceback" not in process.stderr and len(lines) == 1, process.stderr
    assert lines[0].startswith("d2m: error: ")
    return lines[0]


# --- the demo -------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_results_schema(demo):
    results = json.loads((demo / "results.json").read_text())
    assert list(results) == ["seed", "environment", "models"] and results["seed"] == 0
    assert list(results["models"]) == MODELS
    for name, model in results["models"].items():
        assert tuple(model) == FIELDS, name
        routed = name in ("moe", "mob", "prune-depth")
        assert all(isinstance(model[k], (int, float)) for k in FIELDS[:9]), name
        assert (model["dead"] is not None) == (model["busiest"] is not None) == routed, name
    environment = results["environment"]
    assert {"version", "python", "torch", "diffusers", "triton", "cpu", "threads"} <= set(
        environment
    )
    assert environment["backend"] in ("cpu", "torch", "reference", "triton", "cuda")


@pytest.mark.slow
def test_demo_numbers_make_sense(demo):
    m = json.loads((demo / "results.json").read_text())["models"]
    teacher, moe, mob = m["teacher"], m["moe"], m["mob"]
    assert teacher["rel_mse"] == 0 and teacher["latency_ratio"] == 1
    assert teacher["total_params"] == teacher["activated_params"]
    for cost in ("activated_params", "flops"):
        assert mob[cost] < moe[cost] < teacher[cost]
        # comparators activate the same but for the routers
        assert m["prune-mlp"][cost] == pytest.approx(moe[cost], rel=0.02)
        assert m["prune-depth"][cost] == pytest.approx(mob[cost], rel=0.02)
    assert m["prune-mlp"]["total_params"] < moe["total_params"] < mob["total_params"]
    for model in m.values():
        assert model["step_seconds"] > 0 and 0 <= model["words"] <= 1
        assert model["latency_ratio"] == pytest.approx(
            model["step_seconds"] / teacher["step_seconds"]
        )
    # words of icons drawn by chance are read right once in thirty
    assert teacher["words"] > 0.3 and moe["words"] > 0.3
    assert 0 < moe["rel_mse"] < 0.03 and moe["rel_mse"] < mob["rel_mse"] < 0.3
    assert (teacher["psnr"], teacher["ssim"]) == (100, pytest.approx(1))
    assert 8 < mob["psnr"] < moe["psnr"] < 100 and 0 < mob["ssim"] < moe["ssim"] < 1


@pytest.mark.slow
def test_demo_pictures_and_page(demo):
    from matplotlib.image import imread

    for name in PICTURES:
        picture = imread(demo / name)
        assert picture.shape[0] > 200 and picture.shape[1] > 600
        assert picture[..., :3].std() > 0.02, f"{name} is blank"
    assert {p.name for p in (demo / "models").iterdir()} == {"moe", "mob"}
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "prefers-color-scheme:dark" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs other files"
    alts = re.findall(r'alt="([^"]+)"', page)
    assert len(alts) == 4 and all(len(a) > 40 for a in alts)
    assert all(f">{name}</th>" in page for name in MODELS)


@pytest.mark.slow
def test_demo_again_starts_at_once_and_gives_the_same(demo, d2m):
    before = json.loads((demo / "results.json").read_text())["models"]
    samples = (demo / "samples.png").read_bytes()
    start = time.perf_counter()
    process = d2m("demo", "--quick", "--out", demo, "--device", "cpu")
    assert time.perf_counter() - start < 300
    assert "step/s" not in process.stderr  # nothing was trained
    after = json.loads((demo / "results.json").read_text())["models"]
    for name in MODELS:
        for key in FIELDS:
            if key not in ("step_seconds", "latency_ratio"):
                assert before[name][key] == after[name][key], (name, key)
    assert (demo / "samples.png").read_bytes() == samples


@pytest.mark.slow
def test_interrupted_demo_continues_to_the_same_result(demo, d2m, cache, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", "demo", "--quick", "--out", str(out), "--device", "cpu"],
        env=_environment(cache),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 600
    while not list(out.glob("stages/*/mob/*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert not list(out.rglob("*.tmp")) and not (out / "results.json").exists()
    process = d2m("demo", "--quick", "--out", out, "--device", "cpu")
    assert "(b) moe" not in process.stderr  # its stages were done
    assert (out / "samples.png").read_bytes() == (demo / "samples.png").read_bytes()


@pytest.mark.slow
def test_ones_own_prompts_are_drawn_by_the_same_models(demo, d2m):
    from safetensors import safe_open

    process = d2m("demo", "--quick", "--out", demo, "--prompt", "Cloud-Star", "--device", "cpu")
    assert "samples/s" not in process.stderr  # nothing was trained
    with safe_open(demo / "report.safetensors", "pt") as file:
        assert json.loads(file.metadata()["meta"])["prompts"] == ["Cloud-Star"]
        assert file.get_tensor("drawn/moe").shape == (1 + 4, 32, 32)
    d2m("demo", "--quick", "--out", demo, "--device", "cpu")  # as the other tests expect it


@pytest.mark.slow
def test_report_renders_again(demo, d2m):
    page = (demo / "report.html").read_text()
    for name in (*PICTURES, "report.html"):
        (demo / name).unlink()
    d2m("report", demo)
    assert (demo / "report.html").read_text() == page


# --- the other commands ---------------------------------------------------------------------


@pytest.mark.long
def test_help_is_quick_and_lists_commands(d2m):
    process = d2m("--help")
    for command in ("demo", "convert", "distill", "sample", "inspect", "report"):
        assert command in process.stdout
    code = "import sys, distill.cli; distill.cli.parser(); print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=_environment(Path("unused")),
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "False"


DISTIL = """
seed: 1
teacher:
  num_layers: 2
  num_single_layers: 4
  heads: 2
  head_dim: 16
  rope: [4, 6, 6]
  train: {steps: 6, batch_size: 8, lr: 1.0e-3, log_every: 3}
student:
  importance_batches: 1
  calibration: 64
  structure:
    moe: {shared_ratio: 1.0, expert_ratio: 0.25, num_experts: 12, top_k: 2}
    dense_double_blocks: [0]
    adaln_dim: 8
    mob: {single_groups: [[1, 2]]}
stages:
  - {stage: shared, train: {steps: 3, batch_size: 8, lr: 1.0e-3}}
  - {stage: moe, train: {steps: 3, batch_size: 8, lr: 1.0e-3}}
  - {stage: mob, train: {steps: 3, batch_size: 8, lr: 1.0e-3}}
"""


@pytest.fixture(scope="module")
def distilled(d2m, tmp_path_factory):
    """A small student distilled by `d2m distill`: its output folder (model in OUT/model)."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "config.yaml").write_text(DISTIL)
    d2m("distill", folder / "config.yaml", "--out", folder / "out", "--device", "cpu")
    return folder / "out"


@pytest.mark.long
def test_distill_writes_a_model_and_logs(distilled, d2m):
    from d2m_models import FluxMoETransformer2DModel, moe_layers

    model = FluxMoETransformer2DModel.from_pretrained(distilled / "model")
    assert model.d2m_config.mob.single_groups == ((1, 2),) and moe_layers(model)
    for stage in ("shared", "moe", "mob"):
        lines = (distilled / stage / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 3
    assert "wrote" in d2m("distill", distilled.parent / "config.yaml", "--out", distilled).stdout


@pytest.mark.slow
def test_changed_settings_are_refused(distilled, d2m):
    process = d2m(
        "distill", distilled.parent / "config.yaml", "--out", distilled, "--seed", "5", check=False
    )
    assert re.search(r"other settings.*\"seed\": 1.*\"seed\": 5", _error(process))


@pytest.mark.slow
def test_sample_and_inspect(distilled, d2m, tmp_path):
    d2m("sample", distilled / "model", "--out", tmp_path / "s.png", "--steps", "2")
    assert (tmp_path / "s.png").stat().st_size > 2000
    d2m("sample", distilled / "model", "--out", tmp_path / "k.png", "--steps", "2", "--top-k", "0")
    assert (tmp_path / "k.png").read_bytes() != (tmp_path / "s.png").read_bytes()
    process = d2m("inspect", distilled / "model", "--size", "64", "--text-tokens", "4")
    assert re.search(r"^all( +[\d,.]+){5}$", process.stdout, re.M)
    assert re.search(r"^all +8,928\.9 +5,625\.\d ", d2m("inspect", "flux-moe-l").stdout, re.M)


@pytest.mark.slow
def test_convert(d2m, tmp_path):
    import torch

    from d2m_models import FluxMoETransformer2DModel
    from distill.configs.sections import TeacherConfig
    from distill.configs.training import TrainConfig
    from distill.teacher import build_teacher

    sizes = {"num_layers": 2, "num_single_layers": 2, "heads": 2, "head_dim": 8, "rope": [2, 2, 4]}
    dense = build_teacher(
        TeacherConfig(**sizes, train=TrainConfig(steps=1, batch_size=1, lr=1.0)), 0
    )
    dense.save_pretrained(tmp_path / "dense")
    structure = tmp_path / "structure.yaml"
    structure.write_text("{num_layers: 2, num_single_layers: 2, dense_double_blocks: [0]}")
    process = d2m("convert", tmp_path / "dense", tmp_path / "moe", "--structure", structure)
    assert "activated" in process.stdout
    model = FluxMoETransformer2DModel.from_pretrained(tmp_path / "moe")
    model.set_top_k("dense")
    for key, value in dense.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    again = d2m("convert", tmp_path / "dense", tmp_path / "moe", "--structure", structure)
    assert again.stdout.startswith(f"already there: {tmp_path / 'moe'}")


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("demo", "--out", "FILE/below"), "cannot write into the folder"),
        (("demo", "--device", "tpu"), "--device is 'tpu'"),
        (("demo", "--device", "cuda:77"), "--device is 'cuda:77'"),
        (("convert", "nowhere/at/all", "dst", "--preset", "flux-moe-l"), "does not exist"),
        (("convert", "x", "dst", "--preset", "flux-moe-xxl"), "unknown preset 'flux-moe-xxl'"),
        (("convert", "x", "dst", "--structure", "none.yaml"), "cannot read none.yaml"),
        (("distill", "none.yaml"), "cannot read the configuration none.yaml"),
        (("distill", "BAD"), "unknown key stagse"),
        (("sample", "nowhere"), "nowhere wants a PROMPT"),
        (("inspect", "nowhere"), "neither a folder nor a preset"),
        (("inspect", "flux-moe-l", "--size", "100"), "multiples of 16"),
        (("report", "nowhere"), "cannot read nowhere/results.json"),
    ],
)
def test_one_clear_line(tmp_path, monkeypatch, capsys, cache, args, message):
    from distill.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2M_CACHE", str(cache))
    (tmp_path / "FILE").write_text("")
    (tmp_path / "BAD").write_text(DISTIL.replace("stages:", "stagse:"))
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("d2m: error: ") and error.count("\n") == 1 and message in error
    # an empty output folder may remain, nothing else
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file() or any(p.iterdir())) == before


@pytest.mark.slow
def test_truncated_model_is_one_line(distilled, d2m, tmp_path):
    import shutil

    shutil.copytree(distilled / "model", tmp_path / "model")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    process = d2m("sample", tmp_path / "model", "--out", tmp_path / "s.png", check=False)
    assert f"{weights} is truncated, damaged or no safetensors file" in _error(process)
    assert not (tmp_path / "s.png").exists()


@pytest.mark.slow
def test_truncated_stage_checkpoint_is_one_line(distilled, d2m, tmp_path):
    import shutil

    shutil.copytree(distilled, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    stage = tmp_path / "out" / "moe" / "model.safetensors"
    stage.write_bytes(stage.read_bytes()[:-10])
    process = d2m(
        "distill", distilled.parent / "config.yaml", "--out", tmp_path / "out", check=False
    )
    assert "moe/model.safetensors is truncated" in _error(process)


# --- parts of the report --------------------------------------------------------------------


def test_relative_mse_by_hand():
    import torch

    from distill.study.measure import relative_mse

    teacher, student = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert relative_mse(teacher, student) == pytest.approx(1 / 25)


@pytest.mark.long
def test_the_judge_reads_icons_it_has_not_seen():
    from distill.data.icons import Icons
    from distill.study.measure import Judge

    known, new = Icons("train"), Icons("test")
    judge, images = Judge(known), new.to_images(new.latents)
    right = judge.score(images, [" ".join(n) for n in new.names])
    wrong = judge.score(images, [" ".join(n) for n in [*new.names[7:], *new.names[:7]]])
    assert sum(right) / len(right) > 0.5 and sum(wrong) / len(wrong) < 0.06
    same = judge.score(known.to_images(known.latents[:9]), [" ".join(n) for n in known.names[:9]])
    assert same == [1.0] * 9


@pytest.mark.long
def test_icons_are_drawn_by_name(tmp_path, capsys, monkeypatch):
    from distill.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["sample", "icons", "cloud-off", "--steps", "1", "-o", "a.png"]) == 0
    assert main(["sample", "icons", "mdi cloud off", "--steps", "1", "-o", "b.png"]) == 0
    one, two = ((tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert one != two and len(one) > 1000  # the headings differ ...
    for args, message in (
        (["icons"], "wants words"),
        (["icons", "cat", "--offload", "model"], "--offload is for models of a pipeline"),
    ):
        assert main(["sample", *args]) == 2 and message in capsys.readouterr().err


def test_choices_by_hand():
    from types import SimpleNamespace

    import torch

    from distill.study.patterns import Choices

    # two samples (digits 3 and 5) of two tokens, three experts, top-1, two steps; a group of two
    # blocks of which each sample runs one
    choices = Choices(2, ["a", "g"])
    for layer, group in (([0, 0, 1, 2], [0, 1]), ([0, 1, 1, 1], [0, 0])):
        found = {
            name: SimpleNamespace(ids=torch.tensor(ids)[:, None], probs=torch.zeros(len(ids), n))
            for name, ids, n in (("a", layer, 3), ("g", group, 2), ("not asked for", [0], 1))
        }
        choices(0, SimpleNamespace(routing=found, mob={"g": found.pop("g")}))
    labels = torch.tensor([3, 5])
    table = choices.frequencies("a", labels)
    assert table["timestep"].tolist() == [[0.5, 0.25, 0.25], [0.25, 0.75, 0.0]]
    assert table["prompt"][3].tolist() == [0.75, 0.25, 0.0]
    assert table["prompt"][5].tolist() == [0.0, 0.75, 0.25]
    assert table["token"].tolist() == [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]
    assert choices.of("a", 1).tolist() == [[[[0]], [[2]]], [[[1]], [[1]]]]  # the last token
    table = choices.frequencies("g", labels)
    assert table["timestep"].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert table["prompt"][3].tolist() == [1.0, 0.0] and table["prompt"][5].tolist() == [0.5, 0.5]
