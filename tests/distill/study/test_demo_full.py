"""`d2m demo --full`: every model of its table, means over seeds, the page; one kind of device."""

from __future__ import annotations

import copy
import json
import re
import types
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch

for package in ("diffusers", "sklearn", "matplotlib", "yaml", "safetensors", "tqdm"):
    pytest.importorskip(package)

from distill.configs.checked import bundled, load_config
from distill.errors import UserError
from distill.study import demo, demo_page, outcome
from distill.study.config import DemoConfig

KINDS = {
    "teacher": "teacher",
    "moe-l": "moe",
    "prune-mlp": "prune-mlp",
    "mob-m": "mob",
    "mob-s": "mob",
    "prune-depth": "prune-depth",
    "mob-xs": "mob",
    "lite": "prune-depth",
}


def rows(seed: int) -> dict[str, dict]:
    """A table whose numbers move with the seed; MoE beats pruning, MoB only sometimes does."""
    errors = {name: 0.01 * (i + 1) * (1 + 0.1 * seed) for i, name in enumerate(KINDS)}
    errors["mob-s"] = errors["prune-depth"] * (0.8, 1.3, 0.9)[seed % 3]
    return {
        name: {
            "kind": kind,
            "total_params": 1_000_000,
            "activated_params": 500_000,
            "flops": 2e9,
            "step_seconds": 0.5,
            "latency_ratio": 0.5 + 0.1 * seed,
            "rel_mse": errors[name],
            "class_accuracy": 0.9 - 0.2 * seed,
            "psnr": 30.0,
            "ssim": 0.9,
        }
        for name, kind in KINDS.items()
    }


def fake(seed: int) -> outcome.Outcome:
    """What `measure` would give: noise for pictures and curves."""
    g = torch.Generator().manual_seed(seed)
    uses = {"prompt": (10, 3), "timestep": (4, 3), "token": (20, 3)}
    tensors = {f"samples/{name}": torch.rand(20, 8, 8, generator=g) for name in KINDS}
    tensors |= {f"experts/ff/{k}": torch.rand(*size, generator=g) for k, size in uses.items()}
    tensors |= {f"blocks/g/{k}": torch.rand(*uses[k], generator=g) for k in ("prompt", "timestep")}
    curve = torch.tensor([[1.0, 0.5, 1.2], [2.0, 0.4, 1.1]], dtype=torch.float64)
    curves = {name: ["distill"] for name in KINDS if name != "teacher"}
    tensors |= {f"curve/{name}/distill": curve.clone() for name in curves}
    meta = {
        "prompts": [str(d) for d in range(10)],
        "curves": curves,
        "layers": {"ff": "Double block 1"},
        "groups": {"g": "D1-2"},
        "text_tokens": 4,
        "notes": "",
    }
    saved = {
        name: types.SimpleNamespace(save_pretrained=lambda folder: (folder / "w").write_text(""))
        for name in KINDS
    }
    return outcome.Outcome(saved, rows(seed), tensors, meta)


def test_summary_over_seeds():
    table = {seed: rows(seed) for seed in (0, 1, 2)}
    content = demo.summarise([0, 1, 2], table)
    assert content["seeds"] == [0, 1, 2] and list(content["summary"]) == list(KINDS)
    assert content["summary"]["lite"]["latency_ratio"]["mean"] == pytest.approx(0.6)
    assert content["summary"]["lite"]["latency_ratio"]["spread"] == pytest.approx(0.1)
    assert content["summary"]["lite"]["class_accuracy"]["mean"] == pytest.approx(0.7)
    assert content["summary"]["lite"]["class_accuracy"]["spread"] == pytest.approx(0.2)
    for name in KINDS:
        errors = [table[s][name]["rel_mse"] for s in table]
        assert content["summary"][name]["rel_mse"]["mean"] == pytest.approx(mean(errors))
        assert content["summary"][name]["rel_mse"]["spread"] == pytest.approx(stdev(errors))
    moe, mob = content["claims"]
    assert moe["verdict"] == "holds" and moe["claim"].startswith("MoE beats MLP pruning")
    assert moe["detail"] == "ratio of relative MSE 0.667 ± 0.000 over 3 seeds"  # 0.02 / 0.03
    assert mob["verdict"] == "undecided" and mob["claim"].startswith("MoB beats depth pruning")
    assert mob["detail"] == "ratio of relative MSE 1.000 ± 0.265 over 3 seeds"
    assert {s: content["runs"][str(s)] for s in table} == table


def test_full_demo_measures_three_seeds_and_writes_them(tmp_path, monkeypatch):
    """Training, measuring and drawing are replaced, all else is the command's own way."""
    started, trained, said = [], [], []

    def start(config, seed, device, folder, progress):
        started.append((seed, device, folder.name))
        return seed

    def train_all(run, full):
        trained.append(full)
        return {}

    monkeypatch.setattr(demo, "start", start)
    monkeypatch.setattr(demo, "train_all", train_all)
    monkeypatch.setattr(demo, "measure", lambda run, models: fake(run))
    for picture in ("samples_png", "loss_png", "experts_png"):
        monkeypatch.setattr(demo_page, picture, lambda path, *data: path.write_bytes(b"a picture"))
    page = demo.run_demo(tmp_path, quick=True, full=True, seed=1, say=said.append)
    assert [seed for seed, *_ in started] == [1, 2, 3] and trained == [True] * 3
    assert len({folder for *_, folder in started}) == 3
    assert said[0] == "seed 1 (1 of 3)" and "seed 3 (3 of 3)" in said

    content = json.loads((tmp_path / "full.json").read_text())
    assert content == demo.summarise([1, 2, 3], json_keys({s: rows(s) for s in (1, 2, 3)}))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seed"] == 1 and results["models"] == rows(1)  # the table is the first seed's
    for claim in content["claims"]:
        assert f"{claim['claim']}: {claim['verdict']} ({claim['detail']})" in said
    text = page.read_text()
    section = re.search(r"<h2>Over seeds \[1, 2, 3\]</h2>(.*?)</ul>", text, re.S).group(1)
    for name, kind in KINDS.items():
        s = content["summary"][name]
        cells = (
            f"{s['rel_mse']['mean']:.2e} ± {s['rel_mse']['spread']:.1e}",
            f"{s['class_accuracy']['mean']:.3f} ± {s['class_accuracy']['spread']:.3f}",
        )
        row = f'<th scope="row">{name}</th>' + "".join(f"<td>{c}</td>" for c in (kind, *cells))
        assert row in section, name
    for claim in content["claims"]:
        assert f"{claim['claim']}: <strong>{claim['verdict']}</strong>" in section
    assert demo_page.render(tmp_path).read_text() == text  # `d2m report` gives it again

    # one seed afterwards: means of other models would be wrong beside it
    demo.run_demo(tmp_path, quick=True, seed=1, say=said.append)
    assert not (tmp_path / "full.json").exists() and trained[-1] is False
    assert "Over seeds" not in page.read_text()


def json_keys(table):
    """As it is after a turn through JSON."""
    return {seed: json.loads(json.dumps(models)) for seed, models in table.items()}


# --- all models, really trained -------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quick demo's models, each stage three steps long, in one process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("D2M_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(demo, "cores", lambda: 1)
    config = load_config(DemoConfig, bundled("demo-quick.yaml"))

    def short(stage):
        return replace(stage, train=replace(stage.train, steps=3, batch_size=8, warmup=1))

    config = replace(
        config,
        teacher=short(config.teacher),
        shared=short(config.shared),
        moe=short(config.moe),
        mob=short(config.mob),
        evaluate=replace(config.evaluate, per_class=2, sample_steps=2, latency_rounds=1),
        importance_batches=1,
    )
    yield demo.start(config, 0, "cpu", tmp_path_factory.mktemp("stages"), False)
    patch.undo()


@pytest.mark.slow
def test_full_set_is_trained_and_measured(run):
    from d2m_models import MoBConfig

    models = demo.train_all(run, full=True)
    assert list(models) == list(KINDS)
    for name, groups in run.config.groups.items():
        mob = models[f"mob-{name}"].d2m_config.mob
        assert mob.to_dict() == MoBConfig.from_dict(groups).to_dict()
        assert [list(g) for g in mob.double_groups] == groups["double_groups"]
    lite, teacher = models["lite"], run.teacher
    assert len(lite.transformer_blocks) == len(run.config.lite) < len(teacher.transformer_blocks)
    assert len(lite.single_transformer_blocks) == len(teacher.single_transformer_blocks)
    got = demo.measure(run, models)
    assert {name: row["kind"] for name, row in got.rows.items()} == KINDS
    for name, row in got.rows.items():
        assert tuple(row) == demo_page.FIELDS
        assert row["rel_mse"] > 0 or name == "teacher"
    flops = {name: row["flops"] for name, row in got.rows.items()}
    assert flops["mob-xs"] <= flops["mob-s"] < flops["mob-m"] < flops["moe-l"] < flops["teacher"]
    assert flops["lite"] < flops["teacher"]
    # the curves' lengths add up: who is compared with a model trained as long as it did, in all
    last = {
        name: sum(int(got.tensors[f"curve/{name}/{stage}"][-1, 0]) for stage in stages)
        for name, stages in got.meta["curves"].items()
    }
    assert last == {"moe-l": 6, "prune-mlp": 6, "mob-m": 9, "mob-s": 9, "mob-xs": 9,
                    "prune-depth": 9, "lite": 9}  # fmt: skip


def test_a_run_may_move_between_devices_of_one_kind(run):
    """ "cpu" then "cpu:0" finds the stages done; another seed's are still refused."""
    moe, parent = demo.train("moe-l", run)
    file = run.folder / "moe-l" / "moe" / "model.safetensors"
    before = file.stat().st_mtime_ns
    elsewhere = replace(run, teacher=copy.deepcopy(run.teacher).to("cpu:0"))
    again, same = demo.train("moe-l", elsewhere)
    assert same == parent and file.stat().st_mtime_ns == before
    for key, value in moe.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    with pytest.raises(UserError, match="other settings"):
        demo.train("moe-l", replace(run, seed=1))

    def on(device):
        weight = types.SimpleNamespace(device=torch.device(device))
        teacher = types.SimpleNamespace(parameters=lambda: iter([weight]))
        return demo.fingerprint(replace(run, teacher=teacher))

    assert on("cuda:1") == on("cuda") != on("cpu") == demo.fingerprint(run)
