"""The models of the demo: students by the paper's three stages, and the pruned comparators.

teacher --eq. 6--> moe-l (stages a, b) --> mob-m / mob-s / mob-xs (stage c)
   |                    '--> prune-depth (as deep as mob-s runs, as many steps as stage c)
   |--> prune-mlp (same activated FFN width, same steps as a + b)
   '--> lite (fewer double blocks, dense FFNs; as many steps as a + b + c)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill.configs.sections import StageConfig
from distill.configs.training import TrainConfig, first_batch, settings
from distill.data.digits import Digits
from distill.loop.train import train
from distill.stages import (
    VERSION,
    Distillation,
    finish_stage,
    run_stage,
)
from distill.students import group_blocks, make_student, measure_importance
from distill.study import measure as ev
from distill.study.config import DemoConfig
from distill.teacher import load_teacher, modulation_inputs


@dataclass
class Run:
    """One seed's teacher, data and measurements, and where its stages are kept."""

    config: DemoConfig
    seed: int
    device: str
    folder: Path
    progress: bool
    teacher: nn.Module
    digits: Digits
    test: Digits
    importance: dict[str, Tensor]
    temb: Tensor
    structure: Any

    def fingerprint(self, *parts: Any) -> str:
        """Of everything a model depends on before its own training.

        "cpu" and "cpu:0", "cuda" and "cuda:1" are one kind of device: a run may move between them.
        """
        kind = torch.device(self.device).type
        return ckpt.fingerprint(VERSION, settings(self.config), self.seed, kind, *parts)


def start(config: DemoConfig, seed: int, device: str, folder: Path, progress: bool) -> Run:
    """Teacher (trained or from the cache), importance (6) and AdaLN calibration."""
    from d2m_models import FluxMoEConfig

    teacher = load_teacher(config.teacher, config.data, seed, device, progress)
    digits = Digits("train", config.data.timesteps, config.data.timestep_grid)
    structure = FluxMoEConfig.from_dict(
        {
            **config.structure,
            "num_layers": len(teacher.transformer_blocks),
            "num_single_layers": len(teacher.single_transformer_blocks),
        }
    )
    return Run(
        config=config,
        seed=seed,
        device=device,
        folder=ckpt.make_folder(folder),
        progress=progress,
        teacher=teacher,
        digits=digits,
        test=Digits("test"),
        importance=measure_importance(teacher, digits, config.importance_batches, seed),
        temb=modulation_inputs(teacher, digits, config.calibration, seed),
        structure=structure,
    )


# --- students -------------------------------------------------------------------------------


def train_moe(run: Run) -> tuple[nn.Module, str]:
    """Stages (a) and (b): the model "moe-l" and its fingerprint."""
    model = make_student(run.teacher, run.structure, run.importance, run.temb, run.seed)
    parent = run.fingerprint("moe-l")
    for stage in (run.config.shared, run.config.moe):
        parent = _stage(run, model, stage, "moe-l", _first(run, stage.stage), parent)
    return model, parent


def train_mob(run: Run, moe: nn.Module, parent: str, name: str) -> nn.Module:
    """Stage (c): `moe` with its blocks grouped, "mob-m", "mob-s" or "mob-xs"."""
    model = group_blocks(moe, mob_config(run, name), run.seed)
    _stage(run, model, run.config.mob, name, _first(run, "mob"), parent)
    return model


def _first(run: Run, stage: str) -> int:
    """Number of a stage's first batch: it goes on where the stages before it stopped."""
    stages = [run.config.shared, run.config.moe, run.config.mob]
    at = [s.stage for s in stages].index(stage)
    return first_batch([s.train for s in stages[:at]], stages[at].train.batch_size)


def mob_config(run: Run, name: str) -> Any:
    from d2m_models import MoBConfig

    return MoBConfig.from_dict(run.config.groups[name.removeprefix("mob-")])


def _stage(
    run: Run, model: nn.Module, stage: StageConfig, name: str, first: int, parent: str
) -> str:
    letter = {"shared": "a", "moe": "b", "mob": "c"}[stage.stage]
    return run_stage(
        model,
        run.teacher,
        run.digits,
        stage,
        run.folder / name / stage.stage,
        seed=run.seed,
        first=first,
        parent=parent,
        label=f"{name}: ({letter}) {stage.stage}",
        progress=run.progress,
    )


# --- comparators ----------------------------------------------------------------------------


def train_prune_mlp(run: Run) -> nn.Module:
    """Diff-Pruning: keep the r_a * D most important neurons (eq. 6) of every FFN that is MoE in
    moe-l.

    AdaLN is compressed as in moe-l, so that both activate the same parameters but for the routers.
    """
    from d2m_models import convert_flux, prune_mlp

    dense = convert_flux(
        run.teacher,
        replace(run.structure, moe=None),
        adaln_calibration=run.temb if run.structure.adaln_dim is not None else None,
    )
    width = round(run.structure.moe.activated_ratio * run.teacher.inner_dim)
    whole = {f"transformer_blocks.{i}" for i in run.structure.dense_double_blocks}
    whole |= {f"single_transformer_blocks.{i}" for i in run.structure.dense_single_blocks}
    keep = {
        name: score.argsort(descending=True, stable=True)[:width]
        for name, score in run.importance.items()
        if ".".join(name.split(".")[:2]) not in whole
    }
    steps = run.config.shared.train.steps + run.config.moe.train.steps
    config = replace(run.config.moe.train, steps=steps, lr=run.config.pruned_lr)
    return _train_pruned(run, prune_mlp(dense, keep), "prune-mlp", config, 0)


def train_prune_depth(run: Run, moe: nn.Module, parent: str) -> nn.Module:
    """BK-SDM: of every group of mob-s keep one block for good, and train all weights as long as
    stage (c).

    It starts from the same trained MoE model as mob-s and keeps, group by group, the block without
    whose companions the output changes least.
    """
    mob = mob_config(run, "mob-s")
    kept, aliases = choose_blocks(run, moe, mob)
    from d2m_models import prune_depth

    model = prune_depth(moe, kept["double"], kept["single"])
    first = _first(run, "mob")
    # stage (c)'s schedule; what is balanced here are experts, as in stage (b)
    return _train_pruned(run, model, "prune-depth", run.config.mob.train, first, aliases, parent)


def choose_blocks(
    run: Run, model: nn.Module, mob: Any
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Blocks that depth pruning keeps, {"double", "single"}, and pruned block -> teacher block
    names.

    A block that stands for a group is to give what the group's last block gave, as in stage (c).
    """
    from d2m_models import prune_depth

    counts = {
        "double": len(model.transformer_blocks),
        "single": len(model.single_transformer_blocks),
    }
    groups = {"double": mob.double_groups, "single": mob.single_groups}
    kept = {kind: list(range(count)) for kind, count in counts.items()}
    batch = ev.held_out_batch(run.digits, 256, run.seed)
    target = ev.predict(run.teacher, batch)
    for kind in groups:
        for group in groups[kind]:
            trials = {}
            for block in group:
                trial = {**kept, kind: [b for b in kept[kind] if b == block or b not in group]}
                pruned = prune_depth(model, trial["double"], trial["single"])
                trials[block] = (ev.relative_mse(target, ev.predict(pruned, batch)), trial)
            kept = min(trials.values(), key=lambda pair: pair[0])[1]
    aliases = {}
    for kind, prefix in (("double", "transformer_blocks"), ("single", "single_transformer_blocks")):
        last = {b: group[-1] for group in groups[kind] for b in group}
        for new, old in enumerate(kept[kind]):
            aliases[f"{prefix}.{new}"] = f"{prefix}.{last.get(old, old)}"
    return kept, aliases


def train_lite(run: Run) -> nn.Module:
    """FLUX.1-Lite: fewer double blocks, the rest dense; trained as long as a mob model in all."""
    from d2m_models import FluxMoEConfig, convert_flux, prune_depth

    counts = len(run.teacher.transformer_blocks), len(run.teacher.single_transformer_blocks)
    plain = FluxMoEConfig(
        moe=None, dense_double_blocks=(), num_layers=counts[0], num_single_layers=counts[1]
    )
    model = prune_depth(convert_flux(run.teacher, plain), run.config.lite, range(counts[1]))
    stages = (run.config.shared, run.config.moe, run.config.mob)
    # what a kept block gives is compared with the last block it stands for
    ends = [*(b - 1 for b in run.config.lite[1:]), counts[0] - 1]
    aliases = {f"transformer_blocks.{i}": f"transformer_blocks.{end}" for i, end in enumerate(ends)}
    steps = sum(stage.train.steps for stage in stages)
    config = replace(run.config.moe.train, steps=steps, lr=run.config.pruned_lr)
    return _train_pruned(run, model, "lite", config, 0, aliases)


def _train_pruned(
    run: Run,
    model: nn.Module,
    name: str,
    config: TrainConfig,
    first: int,
    aliases: dict[str, str] | None = None,
    parent: str = "",
) -> nn.Module:
    """Distil all weights of a pruned model (eqs. 7-9), in one schedule."""
    model.train().requires_grad_(True)
    objective = Distillation(
        run.teacher,
        model,
        run.digits,
        run.config.moe.loss,
        config.batch_size,
        run.seed,
        first,
        aliases=aliases,
    )
    train(
        model,
        objective,
        config,
        run.folder / name / "distill",
        run_id=run.fingerprint(name, parent, aliases or {}),
        label=name,
        progress=run.progress,
    )
    finish_stage(model)
    return model


def train_all(run: Run, full: bool) -> dict[str, nn.Module]:
    """Every model of the table, in the table's order."""
    from distill.study.worker import beside

    with beside(run, "prune-mlp"):
        moe, parent = train_moe(run)
    models = {"teacher": run.teacher, "moe-l": moe, "prune-mlp": train_prune_mlp(run)}
    with beside(run, "prune-depth"):
        for name in ("mob-m", "mob-s") if full else ("mob-s",):
            models[name] = train_mob(run, moe, parent, name)
    models["prune-depth"] = train_prune_depth(run, moe, parent)
    if full:
        models["mob-xs"] = train_mob(run, moe, parent, "mob-xs")
        models["lite"] = train_lite(run)
    return models
