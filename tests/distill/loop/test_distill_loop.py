"""What the loop offers: parts of a batch, bf16, what it tells while it runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from helpers.distill_cases import CONFIG, gradients, ready, run, same
from safetensors.torch import load_file

from distill.configs.sections import DataConfig, LossConfig
from distill.data.batch import flux_shift
from distill.data.digits import Digits
from distill.errors import TrainingError, UserError
from distill.loop.objective import Distillation, Statistics
from distill.loop.optimizer import make_optimizer
from distill.loop.parallel import World
from distill.loop.progress import Trackers, Utilisation, read_log
from distill.loop.step import autocast
from distill.sampling import Previews, noise_levels

# --- parts of a batch -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moe", "mob"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_parts_of_a_batch_give_its_gradient(kind, reduction):
    """Six samples at once, in parts of 4 and 2... or one by one: loss, loads, gradient agree."""
    loss = LossConfig(balance=1.0, feature_reduction=reduction)
    whole, loads, expected = gradients(ready(kind, loss=loss), CONFIG)
    for micro_batch in (4, 1):
        parts, counted, grads = gradients(
            ready(kind, loss=loss), replace(CONFIG, micro_batch=micro_batch)
        )
        for key in whole:
            assert parts[key].item() == pytest.approx(whole[key].item(), rel=1e-5), key
        assert all(torch.equal(counted[k].long(), v.long()) for k, v in loads.items())
        same(grads, expected, 1e-3)


def test_balance_of_blocks_needs_the_whole_batch():
    """The trap: of one sample alone every load is 1 for one block, 0 for the others."""
    student, _, objective = ready("mob")
    whole = objective(3)["balance"]
    out = student(**objective.batch(3).inputs(), output_aux=True)
    assert len(out.aux.mob["mob.single.0"].ids.unique()) == 2  # both blocks are chosen
    each = []
    for row in range(CONFIG.batch_size):
        terms = objective.terms(objective.batch(3, slice(row, row + 1)))
        each.append(objective.loss(terms, terms.statistics)["balance"])
    assert abs(torch.stack(each).mean() - whole) > 1e-2


def test_statistics_add_up_by_hand():
    def part(rows, distill, error, norm, load):
        tensors = torch.tensor(distill), torch.tensor([error]), torch.tensor([norm])
        return Statistics(rows, *tensors, {"a": torch.tensor(load)}, {"a": torch.tensor(sum(load))})

    both = Statistics.combine(
        [part(1, 1.0, 2.0, 3.0, [1, 0]), part(3, 5.0, 6.0, 4.0, [1, 2])], World()
    )
    assert both.rows == 4 and both.distill.item() == (1 + 3 * 5) / 4
    assert both.errors.tolist() == [(2 + 3 * 6) / 4] and both.norms.tolist() == [5.0]
    assert both.loads["a"].tolist() == [2, 2] and both.tokens["a"].item() == 4


# --- how it computes ------------------------------------------------------------------------


def test_bf16_compute_on_fp32_weights(tmp_path):
    student, frozen, objective = ready()
    seen = set()
    student.single_transformer_blocks[0].register_forward_hook(
        lambda _m, _a, out: seen.add(out[1].dtype)
    )
    config = replace(CONFIG, compute_dtype="bfloat16", ema=0.9)
    log = run((student, frozen, objective), tmp_path / "bf16", config)
    exact = run(ready(), tmp_path / "fp32")
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert log[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.1) and log != exact
    optimizer = make_optimizer(ready()[0], config)
    assert not optimizer.state
    with autocast(config, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("kind", ["moe", "mob"])
def test_gradient_checkpointing_changes_nothing(kind):
    _, _, expected = gradients(ready(kind), CONFIG)
    made = ready(kind)
    made[0].enable_gradient_checkpointing()
    _, _, grads = gradients(made, CONFIG)
    same(grads, expected, 1e-5)


def test_checkpointing_keeps_ids_that_would_flip(monkeypatch):
    """The trap: routed again in the backward pass, a token could go to other experts."""
    from d2m_models.moe import ExpertLayer

    made, calls = ready(), []
    made[0].enable_gradient_checkpointing()
    choose = ExpertLayer.choose
    monkeypatch.setattr(
        ExpertLayer, "choose", lambda self, *a: calls.append(self) or choose(self, *a)
    )
    gradients(made, CONFIG)
    layers = [m for m in made[0].modules() if getattr(m, "num_experts", 0)]
    assert len(calls) == len(layers) == len(set(map(id, calls)))  # once each, not once a pass


def test_eight_bit_moments_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'dense2moe\[8bit\]'"):
        make_optimizer(ready()[0], replace(CONFIG, optimizer="adamw8bit"))


def test_a_block_that_nobody_chose_is_decayed_as_when_sharded(tmp_path):
    """Sharded, its gradient is zero; without one, AdamW would pass over it."""
    student, frozen, objective = ready("mob")
    with torch.no_grad():  # all samples choose the first block of the group
        (router,) = student.mob_routers["single_groups"]
        router.alpha = 0.0
        router.condition_gate.weight.zero_()
    before = student.single_transformer_blocks[2].proj_mlp.weight.clone()
    config = replace(CONFIG, steps=1, weight_decay=0.5, log_every=1)
    run((student, frozen, objective), tmp_path, config)
    after = student.single_transformer_blocks[2].proj_mlp.weight
    torch.testing.assert_close(after, before * (1 - CONFIG.lr * 0.5))


def test_guidance_is_told_to_both_models():
    from diffusers import FluxTransformer2DModel

    from d2m_models import MoEConfig, convert_flux
    from distill.teacher import modulation_inputs

    class Guided(Digits):
        def batch(self, *arguments, **options):
            batch = super().batch(*arguments, **options)
            return replace(batch, guidance=torch.full((len(batch),), self.scale))

    torch.manual_seed(0)
    teacher = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).requires_grad_(False)
    student = convert_flux(teacher, MoEConfig(1.0, 0.25, 12, 2))
    source, outputs = Guided("train"), {}
    for model in (teacher, student):
        model.register_forward_hook(
            lambda m, _a, out: outputs.setdefault(type(m).__name__, []).append(out.sample.detach())
        )
    tembs = []
    for source.scale in (1.0, 3.5):
        Distillation(teacher, student, source, LossConfig(), 4, 0)(0)
        tembs.append(modulation_inputs(teacher, source, 4, 0))
    assert not torch.equal(*tembs) and len(outputs) == 2
    for name, (first, second) in outputs.items():
        assert not torch.equal(first, second), name


# --- bad batches ----------------------------------------------------------------------------


def test_a_bad_batch_is_kept(tmp_path):
    class Poisoned(Digits):
        def batch(self, seed, step, count, stream="train", rows=None):
            batch = super().batch(seed, step, count, stream, rows)
            return replace(batch, x0=batch.x0 * float("nan")) if step >= 2 else batch

    config = replace(CONFIG, max_bad_steps=1)
    with pytest.raises(TrainingError, match="2 steps in a row.*bad-batch-3.safetensors"):
        run(ready(source=Poisoned("train")), tmp_path, config)
    dumped = load_file(tmp_path / "bad-batch-3.safetensors")
    expected = Digits("train").batch(0, 3, CONFIG.batch_size)
    assert dumped["x0"].isnan().all() and torch.equal(dumped["noise"], expected.noise)
    assert torch.equal(dumped["labels"], expected.labels) and torch.equal(dumped["t"], expected.t)


# --- what it tells --------------------------------------------------------------------------


def test_utilisation_by_hand():
    use = Utilisation()
    use.add({"a": torch.tensor([3, 1, 0, 0]), "b": torch.tensor([2, 2])})
    use.add({"a": torch.tensor([3, 1, 0, 0]), "b": torch.tensor([2, 2])})
    table = use.take()
    assert table == {"a": [3.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0]}
    assert use.dead(table) == ["a: expert 2", "a: expert 3"]
    assert use.dead(table) == [] and use.take() == {}  # each is called out once


def test_logs_hold_experts_memory_and_speed(tmp_path, capsys):
    made = ready()
    with torch.no_grad():
        made[0].single_transformer_blocks[1].router.weight[7:].zero_()
        made[0].single_transformer_blocks[1].router.weight[:7].mul_(1000)
    log = run(made, tmp_path)
    tables = read_log(tmp_path / "experts.jsonl")
    assert [t["step"] for t in tables] == [e["step"] for e in log] == [2, 4]
    for entry, table in zip(log, tables, strict=True):
        values = [v for layer in table["load"].values() for v in layer]
        assert entry["expert_min"] == min(values) and entry["expert_max"] == max(values)
        for layer in table["load"].values():
            assert len(layer) == 12 and sum(layer) == pytest.approx(12, abs=1e-2)
        assert 0.1 < entry["peak_memory_gib"] < 50 and entry["samples_per_second"] > 0
    assert "chosen by nobody since step 0: " in capsys.readouterr().err


def test_previews_from_the_same_noise(tmp_path):
    made = ready()
    source = made[2].source
    steps = []
    previews = Previews(source, tmp_path / "previews", 0, World(), DataConfig(), CONFIG, steps=2)

    def preview(model, step):
        assert model.training
        previews(model, step)
        assert model.training
        steps.append(step)

    run(made, tmp_path, replace(CONFIG, preview_every=2), preview=preview)
    assert steps == [2, 4]
    pictures = sorted((tmp_path / "previews").iterdir())
    assert [p.name for p in pictures] == ["step-0000002.png", "step-0000004.png"]
    from matplotlib.image import imread

    assert imread(pictures[0]).shape[:2] == (8, 80)
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    previews(made[0], 4)
    assert pictures[1].read_bytes() == (tmp_path / "previews/step-0000004.png").read_bytes()


GRID = DataConfig(timesteps="grid", timestep_grid=[0.3, 1.0, 0.75])


@pytest.mark.parametrize(
    ("data", "compute"),
    [
        (GRID, "bfloat16"),
        (DataConfig(timesteps="flux-shift"), "float32"),
        (DataConfig(timesteps="logit-normal"), "bfloat16"),
    ],
)
def test_previews_are_drawn_as_the_run_computes(tmp_path, data, compute):
    """At the noise levels that the teacher knows, in the precision of training."""
    student, _, objective = ready()
    asked, types = [], set()

    def look(_model, _args, inputs):
        asked.append(float(inputs["timestep"][0]))
        types.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        assert {inputs[k].dtype for k in ("timestep", "hidden_states")} == {torch.float32}

    student.register_forward_pre_hook(look, with_kwargs=True)
    train = replace(CONFIG, compute_dtype=compute)
    Previews(objective.source, tmp_path, 0, World(), data, train, steps=4)(student, 1)
    mu = flux_shift(16)
    expected = {
        "grid": [1.0, 0.75, 0.3],
        "logit-normal": [1.0, 0.75, 0.5, 0.25],
        "flux-shift": [1 / (1 + torch.tensor(-mu).exp().item() * (1 / t - 1))
                       for t in (1.0, 0.75, 0.5, 0.25)],
    }  # fmt: skip
    assert asked == pytest.approx(expected[data.timesteps], rel=1e-5)
    assert types == {torch.bfloat16 if compute == "bfloat16" else None}
    assert (tmp_path / "step-0000001.png").exists()


def test_shifted_levels_are_those_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for tokens in (256, 1024, 4096):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        sigmas = [1 - i / 12 for i in range(12)]
        scheduler.set_timesteps(sigmas=sigmas, mu=flux_shift(tokens))
        levels = noise_levels(DataConfig(timesteps="flux-shift"), tokens, 12)
        assert levels == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)


def test_trackers_get_every_number(tmp_path, monkeypatch):
    told = {"board": [], "wandb": []}
    board = SimpleNamespace(add_scalar=lambda *a: told["board"].append(a), close=lambda: None)
    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = lambda folder: board
    run_ = SimpleNamespace(log=lambda d, step: told["wandb"].append((step, d)), finish=lambda: None)
    wandb = ModuleType("wandb")
    wandb.init = lambda **options: told.setdefault("id", options["id"]) and run_
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = run(ready(), tmp_path, replace(CONFIG, loggers=["tensorboard", "wandb"]))
    numbers = [{k: v for k, v in e.items() if k != "step"} for e in log]
    assert [d for _, d in told["wandb"]] == numbers and [s for s, _ in told["wandb"]] == [2, 4]
    assert ("test/loss", log[0]["loss"], 2) in told["board"]
    assert len(told["board"]) == sum(map(len, numbers))


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run(ready(), tmp_path, replace(CONFIG, loggers=["tensorboard"]))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    assert set(board.Tags()["scalars"]) == {f"test/{k}" for k in log[0] if k != "step"}
    for key in ("loss", "lr", "peak_memory_gib"):
        points = [(p.step, p.value) for p in board.Scalars(f"test/{key}")]
        assert [step for step, _ in points] == [2, 4]
        assert [v for _, v in points] == pytest.approx([e[key] for e in log], rel=1e-6)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named(tmp_path, monkeypatch, name):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        Trackers([name], tmp_path, "test")
    assert json.dumps(Trackers([], tmp_path, "test").write(1, {"loss": 1.0})) == "null"


def test_eight_bit_moments_resume_bit_for_bit(tmp_path):
    pytest.importorskip("torchao.optim")
    from distill.loop import snapshots

    def start(stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))

        def objective(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            return {"loss": (model(x) - x.flip(1)).square().mean()}

        return model, [], objective

    config = replace(CONFIG, optimizer="adamw8bit", steps=6)
    whole, again = start(), start()
    run(whole, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        run(start(stop_at=5), tmp_path / "parts", config)
    (file,) = (snapshots.newest(tmp_path / "parts") / "tensors").iterdir()
    codes = load_file(file)["optimizer/0.weight/exp_avg.codes"]
    assert codes.dtype == torch.uint8 and codes.numel() == 64 * 128
    run(again, tmp_path / "parts", config)
    state = again[0].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole[0].state_dict().items())
