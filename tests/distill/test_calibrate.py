"""`d2m convert --calibrate`: from a dense folder to experts, routers and outputs fitted to data."""

from __future__ import annotations

import json

import pytest
import torch

yaml = pytest.importorskip("yaml")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from d2m_models import moe_layers
from d2m_models.checkpoints.load import load_flux, load_model
from distill import students
from distill.cli import main
from distill.configs.sections import TeacherConfig
from distill.data.batch import held_out_batch
from distill.data.digits import Digits
from distill.study.measure import predict, relative_mse
from distill.teacher import build_teacher

STRUCTURE = {
    "moe": {"shared_ratio": 1.0, "expert_ratio": 0.25, "num_experts": 12, "top_k": 2},
    "dense_double_blocks": [0],
    "adaln_dim": 8,
    "num_layers": 2,
    "num_single_layers": 2,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    sizes = TeacherConfig(path="-", num_layers=2, num_single_layers=2, heads=2, head_dim=8,
                          rope=[4, 2, 2])  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    build_teacher(sizes, 0).save_pretrained(folder)
    return folder


@pytest.fixture
def convert(dense, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STRUCTURE))

    def run(name, *more):
        target = tmp_path / name
        return target, main(["convert", str(dense), str(target), "--structure",
                             str(tmp_path / "s.yaml"), "--dtype", "float32", *more])  # fmt: skip

    return run


DIGITS = ("--calibrate", "digits", "--tokens", "600")


def error(dense, folder):
    batch = held_out_batch(Digits("test"), 64, 0)
    teacher, student = load_flux(dense), load_model(folder)
    return relative_mse(predict(teacher, batch), predict(student, batch))


@pytest.mark.long
def test_a_calibrated_model_starts_nearer(convert, dense, capsys):
    target, status = convert("calibrated", *DIGITS)
    assert status == 0
    printed = capsys.readouterr().out
    assert "is converted, not distilled: its routers are fitted, nothing is trained" in printed
    assert "calibrated on digits: an FFN's relative error before training is" in printed
    plain, _ = convert("plain")
    kept, _ = convert("kept", *DIGITS, "--keep-outputs")
    calibrated, own, unfitted = (error(dense, f) for f in (target, kept, plain))
    assert calibrated < 0.3 * own < 0.5 * unfitted
    layers = moe_layers(load_model(target))
    for name, layer in layers.items():
        rows = layer.router.weight.view(6, 2, -1)  # two experts serve a cluster
        assert torch.equal(rows[:, 0], rows[:, 1]) and len(rows[:, 0].unique(dim=0)) == 6, name
    record = json.loads((target / "d2m_conversion.json").read_text())
    assert record["outputs"] == "refitted" and record["adaln_calibration"] != "random"
    start = json.loads((target.with_name("calibrated.start") / "start.json").read_text())
    assert set(layers) < set(start["errors"]) and max(start["errors"].values()) < 0.2


@pytest.mark.slow
def test_what_was_refitted_is_said(convert, dense, tmp_path, capsys):
    target, _ = convert("m", *DIGITS)
    assert convert("m", *DIGITS, "--verify")[1] == 0
    assert "8 refitted FFN outputs are finite and not compared" in capsys.readouterr().out
    back = str(tmp_path / "back")
    assert main(["convert", str(target), back, "--to-dense"]) == 2
    assert "were refitted" in capsys.readouterr().err
    kept, _ = convert("kept", *DIGITS, "--keep-outputs", "--keep-adaln")
    assert main(["convert", str(kept), back, "--to-dense"]) == 0
    for a, b in zip(load_flux(dense).parameters(), load_flux(back).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on(convert, monkeypatch):
    whole, _ = convert("whole", *DIGITS)
    real, seen = students.start_ffn, []

    def stop_at_the_third(*args):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(students, "start_ffn", stop_at_the_third)
    target, status = convert("cut", *DIGITS)
    assert status == 130 and not target.exists()
    assert len(list(target.with_name("cut.start").glob("*.safetensors"))) == 2
    assert convert("cut", *DIGITS)[1] == 0
    assert len(seen) == 3 + 4  # of six FFNs, those that were left
    states = [load_model(f).state_dict() for f in (whole, target)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.slow
def test_what_does_not_go_together_is_refused(convert, capsys):
    assert convert("m", *DIGITS, "--order", "x.safetensors")[1] == 2
    assert "leave out these" in capsys.readouterr().err
    convert("m", *DIGITS)
    assert convert("m", "--calibrate", "digits", "--tokens", "500")[1] == 2
    assert "m.start was measured with other settings; remove it" in capsys.readouterr().err
