"""`d2m distill --plan` against what a run really takes, and the ready configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from d2m_kernels.backends import cpu
from distill.configs.checked import bundled, load_config
from distill.configs.sections import DistillConfig, LossConfig, StageConfig
from distill.configs.training import TrainConfig
from distill.data.digits import Digits
from distill.errors import ConfigError
from distill.plan.memory import plan, render
from distill.stages import run_stage
from distill.students import group_blocks, make_student
from distill.teacher import build_teacher

GIB = 2**30


def small(stage, **train):
    """The digits configuration with one stage of two steps."""
    config = load_config(DistillConfig, "digits.yaml")
    settings = {"steps": 2, "batch_size": 32, "lr": 1e-3, "log_every": 100, **train}
    return replace(config, stages=[StageConfig(stage, TrainConfig(**settings), LossConfig())])


def measured(config, folder):
    """Most bytes of tensors that are alive at once in two steps, by the allocator's own account."""
    from distill.pipeline import student_structure

    (stage,) = config.stages
    teacher = build_teacher(config.teacher, 0).eval().requires_grad_(False)
    structure = student_structure(config, teacher)
    zeros = {n: torch.zeros(m) for n, m in _widths(teacher).items()}
    temb = torch.randn(64, teacher.inner_dim)
    model = make_student(teacher, structure, zeros, temb, 0)
    if stage.stage == "mob":
        model = group_blocks(model, structure.mob, 0)
    source = Digits("train")
    own = sum(p.nbytes for m in (teacher, model) for p in m.parameters())
    options = {"seed": 0, "first": 0, "parent": "", "label": "", "progress": False}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run_stage(model, teacher, source, stage, folder, **options)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > own / 10
    return own + peak


def _widths(teacher):
    from distill.importance import ffn_linears

    return {name: up.out_features for name, (up, _, _) in ffn_linears(teacher).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "train"),
    [
        ("moe", {}),
        ("moe", {"ema": 0.9, "gradient_checkpointing": True}),
        ("moe", {"micro_batch": 8, "ema": 0.9}),
        ("shared", {"compute_dtype": "bfloat16"}),
        ("mob", {"batch_size": 64}),
    ],
    ids=["moe", "checkpointing", "parts", "shared in bf16", "mob"],
)
def test_planned_memory_is_what_a_run_takes(tmp_path, monkeypatch, stage, train):
    # The plan is of GPUs, whose kernels keep nothing between calls.
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", 0)
    cpu.forget_workspace()
    config = small(stage, **train)
    (planned,) = plan(config)
    really = measured(config, tmp_path)
    assert planned.memory.peak == pytest.approx(really, rel=0.1)


# --- the ready configurations ---------------------------------------------------------------

FITS = {  # GPUs, GiB of each
    "flux-moe-l": (32, 74.5),
    "flux-moe-m": (32, 74.5),
    "flux-moe-s": (32, 74.5),
    "flux-moe-xs": (32, 74.5),
    "hyper-flux-moe-l": (32, 74.5),
    "flux-moe-l-8x80gb": (8, 74.5),
    "flux-moe-l-1x141gb": (1, 131.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_ready_configurations_fit_their_gpus(name):
    """With something to spare, for what the allocator and the libraries take."""
    config = load_config(DistillConfig, f"{name}.yaml")
    gpus, memory = FITS[name]
    assert (config.parallel.shard or 1) * config.parallel.replicate == gpus
    # stages of one structure need the same; the last MoE stage and the last of all tell the rest
    config = replace(config, stages=[s for s in config.stages if s.stage != "shared"])
    for stage in plan(config):
        assert 0.3 * memory < stage.memory.peak / GIB < 0.92 * memory, stage
        held = stage.memory.weights * (config.parallel.shard or 1)
        assert held / 4e9 == pytest.approx(8.93, abs=0.01)  # the presets' parameters, in B
    assert {s.train.compute_dtype for s in config.stages} == {"bfloat16"}


def test_every_bundled_distillation_is_listed():
    folder = bundled("digits.yaml").parent
    assert {p.stem for p in folder.glob("*flux*.yaml")} == set(FITS)


def test_a_hyper_teacher_has_its_own_noise_levels():
    """i/8 with FLUX's shift at 4096 image tokens, as an 8-step pipeline takes them."""
    import math

    from distill.data.batch import flux_shift

    config = load_config(DistillConfig, "hyper-flux-moe-l.yaml")
    e = math.exp(flux_shift(4096))
    expected = [e / (e + 8 / i - 1) for i in range(8, 0, -1)]
    assert config.data.timestep_grid == pytest.approx(expected, abs=1e-4)
    assert config.teacher.lora and config.teacher.lora_scale == 0.125


def test_a_lora_is_fused_into_the_teacher(tmp_path):
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    from distill.configs.sections import TeacherConfig
    from distill.teacher import load_teacher

    base = build_teacher(load_config(DistillConfig, "digits.yaml").teacher, 0)
    assert isinstance(base, FluxTransformer2DModel)
    base.save_pretrained(tmp_path / "teacher")
    name = "single_transformer_blocks.1.attn.to_q"
    weight = base.get_submodule(name).weight.detach()
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    lora = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    save_file(lora, tmp_path / "lora.safetensors")
    config = TeacherConfig(
        path=str(tmp_path / "teacher"), lora=str(tmp_path / "lora.safetensors"), lora_scale=0.125
    )
    data = load_config(DistillConfig, "digits.yaml").data
    teacher = load_teacher(config, data, 0)
    torch.testing.assert_close(teacher.get_submodule(name).weight, weight + 0.125 * b @ a)
    low = load_teacher(replace(config, lora=None, dtype="bfloat16"), data, 0)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


# --- the command ----------------------------------------------------------------------------


def test_flops_and_time_by_hand():
    from d2m_models import account
    from d2m_models.conversion.flux import skeleton
    from distill.pipeline import student_structure
    from distill.plan.skeleton import teacher_skeleton

    config = small("moe", micro_batch=8, gradient_checkpointing=True)
    (planned,) = plan(config)
    teacher = teacher_skeleton(config.teacher)
    student = skeleton(teacher, replace(student_structure(config, teacher), mob=None))
    sizes = {"image_tokens": 16, "text_tokens": 4}
    own, known = account(student, **sizes).flops, account(teacher, **sizes).flops
    assert planned.flops == pytest.approx(5 * own + 2 * known)  # two forwards more than 3 + 1
    text = render([planned], 1, 0.001)
    assert f"{2 * 32 * planned.flops / 1e9 / 3600:.2f} hours in all at 0.001 TFLOP/s" in text


@pytest.mark.long
def test_the_command_loads_nothing(tmp_path, monkeypatch, capsys):
    from distill.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["distill", "digits.yaml", "--plan", "--tflops", "0.05"]) == 0
    out, err = capsys.readouterr()
    assert "counting stage 1 of 3, shared: no weights are read" in err and "Warning" not in err
    for word in ("optimizer", "activations", "peak", "TFLOP/sample", "hours in all at 0.05"):
        assert word in out
    assert list(tmp_path.iterdir()) == []
    assert main(["distill", "digits.yaml", "--plan", "--tflops", "0"]) == 2
    assert main(["distill", "digits.yaml", "--plan", "--gpus", "7"]) == 2
    assert "expected a multiple of the 7 GPUs" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected the number of GPUs, 2"):
        config = load_config(DistillConfig, "digits.yaml")
        plan(replace(config, parallel=replace(config.parallel, shard=4)), gpus=2)


@pytest.mark.parametrize(
    ("stage", "train"),
    [
        ("moe", {}),
        pytest.param("mob", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_a_kind_are_counted_once(monkeypatch, stage, train):
    """As many bytes, and after the same blocks, as when every block runs."""
    from distill.plan import skeleton

    config = small(stage, **train)
    structure = {
        "moe": {"shared_ratio": 1.0, "expert_ratio": 0.25, "num_experts": 12, "top_k": 2},
        "dense_double_blocks": [0], "mob": {"double_groups": [[1, 2], [3, 4], [5, 6], [7, 8]],
                                            "single_groups": [[1, 2]]},
    }  # fmt: skip
    config = replace(
        config, teacher=replace(config.teacher, num_layers=10, num_single_layers=4),
        student=replace(config.student, structure=structure, preset=None),
    )  # fmt: skip
    ran = []
    kept = skeleton._kept
    monkeypatch.setattr(
        skeleton, "_kept", lambda *a: ran.append(len(a[1].transformer_blocks)) or kept(*a)
    )
    (short,) = plan(config)
    assert max(ran) < 10
    monkeypatch.setattr(skeleton, "fewer", lambda whole: whole)
    (whole,) = plan(config)
    assert ran[-1] == 10
    assert short == whole


@pytest.mark.slow
def test_the_plan_of_flux_takes_seconds():
    from time import process_time

    start = process_time()
    plan(load_config(DistillConfig, "flux-moe-s.yaml"))
    assert process_time() - start < 20
