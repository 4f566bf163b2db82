"""The models that `d2m ablate` compares: how each is made from the teacher, and what it trains.

All arms of one comparison see the same batches in the same order for the same number of steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.configs.checked import to_dict
from distill.configs.sections import StageConfig
from distill.configs.training import first_batch
from distill.importance import taylor_importance
from distill.loop.train import train
from distill.stages import Distillation, finish_stage, run_stage
from distill.students import group_blocks, make_student
from distill.study.config import AblateConfig
from distill.study.teachers import fingerprint


@dataclass(frozen=True)
class Context:
    """One seed's teacher, data and folder; rates: learning rate of every kind of arm."""

    config: AblateConfig
    seed: int
    folder: Path
    teacher: nn.Module
    source: Any
    rates: Mapping[str, float]
    share: float = 1.0  # of every training's steps; below 1 in the learning-rate search
    progress: bool = False

    def stage(self, config: StageConfig, kind: str, **changes: Any) -> StageConfig:
        """A stage with this kind's learning rate, and its steps times `share`."""
        own = config.train
        steps = max(1, round(changes.pop("steps", own.steps) * self.share))
        tuned = replace(own, steps=steps, lr=self.rates.get(kind, own.lr))
        return replace(config, train=tuned, **changes)


# --- arms -------------------------------------------------------------------------------------


def structure(context: Context, fields: Mapping[str, Any], **changes: Any) -> Any:
    from d2m_models import FluxMoEConfig

    teacher = context.teacher
    counts = {
        "num_layers": len(teacher.transformer_blocks),
        "num_single_layers": len(teacher.single_transformer_blocks),
    }
    return FluxMoEConfig.from_dict({**fields, **counts, **changes})


def importance(context: Context) -> dict[str, Tensor]:
    """Eq. (6) on this seed's calibration data."""
    config = context.config
    batches = (
        context.source.batch(context.seed, i, config.importance_samples, "calibrate")
        for i in range(config.importance_batches)
    )
    return taylor_importance(context.teacher, batches)


def train_moe(
    context: Context, name: str, fields: Mapping[str, Any], *, initialisation: str = "taylor",
    stages: str = "ab", kind: str = "moe",
) -> tuple[nn.Module, nn.Module | None]:  # fmt: skip
    """(model, the model after stage (a) with shared experts only, if there was one).

    initialisation: "taylor" (eq. 6) or "random", which neurons are shared. stages: "ab" the
    paper's, "a" the first alone, "joint": one stage in which shared and routed experts train
    together.
    """
    scores = None if initialisation == "random" else importance(context)
    model = make_student(context.teacher, structure(context, fields), scores, None, context.seed,
                         initialisation=initialisation)  # fmt: skip
    config = context.config
    parent = fingerprint(name, to_dict(config.teacher), context.seed, context.share,
                         config.importance_batches, config.importance_samples)  # fmt: skip
    both = config.shared.train.steps + config.moe.train.steps
    plan = {
        "ab": (context.stage(config.shared, kind), context.stage(config.moe, kind)),
        "a": (context.stage(config.shared, kind),),
        "joint": (context.stage(config.moe, kind, steps=both, freeze_shared=False),),
    }[stages]
    after_a = None
    for number, stage in enumerate(plan):
        first = first_batch([s.train for s in plan[:number]], stage.train.batch_size)
        parent = run_stage(model, context.teacher, context.source, stage,
                           context.folder / name / stage.stage, seed=context.seed, first=first,
                           parent=parent, label=f"{name} {stage.stage}",
                           progress=context.progress)  # fmt: skip
        if stage.stage == "shared":
            after_a = _copy(model)
    return model, after_a


def _copy(model: nn.Module) -> nn.Module:
    from d2m_models import set_top_k

    twin = copy.deepcopy(model)
    set_top_k(twin, 0)
    return twin


def train_mob(context: Context, name: str, groups: Mapping[str, Any], **changes: Any) -> nn.Module:
    """MoB groups of dense blocks (Table 3 has no experts), stage (c)."""
    from d2m_models import MoBConfig, convert_flux

    mob = MoBConfig.from_dict(groups)
    dense = convert_flux(context.teacher, structure(context, {"moe": None}))
    model = group_blocks(dense, mob, context.seed)
    parent = fingerprint(name, to_dict(context.config.teacher), context.seed, context.share)
    stage = context.stage(context.config.mob, "mob", **changes)
    run_stage(model, context.teacher, context.source, stage, context.folder / name / "mob",
              seed=context.seed, first=0, parent=parent, label=name,
              progress=context.progress)  # fmt: skip
    return model


def train_pruned_mlp(context: Context, name: str, ratio: float) -> nn.Module:
    """Diff-Pruning: the ratio * D neurons of highest Taylor score (6) in every FFN that is MoE."""
    from d2m_models import convert_flux, prune_mlp

    fields = structure(context, context.config.structure)
    dense = convert_flux(context.teacher, structure(context, {"moe": None}))
    whole = {f"transformer_blocks.{i}" for i in fields.dense_double_blocks}
    whole |= {f"single_transformer_blocks.{i}" for i in fields.dense_single_blocks}
    width = round(ratio * context.teacher.inner_dim)
    keep = {
        n: score.argsort(descending=True, stable=True)[:width]
        for n, score in importance(context).items()
        if ".".join(n.split(".")[:2]) not in whole
    }
    steps = context.config.shared.train.steps + context.config.moe.train.steps
    stage = context.stage(context.config.moe, "prune-mlp", steps=steps)
    model = prune_mlp(dense, keep)
    model.requires_grad_(True)
    return distil_pruned(context, model, name, stage)


def train_pruned_depth(
    context: Context, name: str, groups: Mapping[str, Any], method: str
) -> nn.Module:
    """Depth pruning to the depth of a MoB model: one block stays of each of its groups.

    method "bk" (BK-SDM): the block without whose companions the teacher's output changes least;
    then all weights train. "lite" (FLUX.1-Lite): the block that changes its input most; then only
    the blocks that now stand for a group train, the rest is frozen.
    """
    from d2m_models import MoBConfig, convert_flux, prune_depth

    mob = MoBConfig.from_dict(groups)
    dense = convert_flux(context.teacher, structure(context, {"moe": None}))
    kept = choose_blocks(context, dense, mob, method)
    model = prune_depth(dense, kept["double"], kept["single"])
    model.requires_grad_(method == "bk")
    aliases = {}
    for part, prefix, own in (
        ("double", "transformer_blocks", mob.double_groups),
        ("single", "single_transformer_blocks", mob.single_groups),
    ):
        last = {b: group[-1] for group in own for b in group}
        for new, old in enumerate(kept[part]):
            aliases[f"{prefix}.{new}"] = f"{prefix}.{last.get(old, old)}"
            if method == "lite" and old in last:
                getattr(model, prefix)[new].requires_grad_(True)
    stage = context.stage(context.config.mob, method)
    return distil_pruned(context, model, name, stage, aliases)


def choose_blocks(context: Context, dense: nn.Module, mob: Any, method: str) -> dict[str, list]:
    """{"double", "single"}: blocks that depth pruning keeps, one of each group."""
    from d2m_models import prune_depth
    from distill.study.measure import predict, relative_mse
    from distill.study.patterns import block_changes

    batch = context.source.batch(context.seed, 0, 128, "calibrate")
    kept = {"double": list(range(len(dense.transformer_blocks))),
            "single": list(range(len(dense.single_transformer_blocks)))}  # fmt: skip
    groups = {"double": mob.double_groups, "single": mob.single_groups}
    change = block_changes(context.teacher, batch) if method == "lite" else {}
    target = predict(context.teacher, batch)
    for part, own in groups.items():
        for group in own:
            cost = {}
            for block in group:
                trial = {**kept, part: [b for b in kept[part] if b == block or b not in group]}
                if method == "lite":
                    cost[block] = -float(change[part][block].mean()), trial
                else:
                    output = predict(prune_depth(dense, trial["double"], trial["single"]), batch)
                    cost[block] = relative_mse(target, output), trial
            kept = min(cost.values(), key=lambda pair: pair[0])[1]
    return kept


def distil_pruned(
    context: Context, model: nn.Module, name: str, stage: StageConfig,
    aliases: Mapping[str, str] | None = None,
) -> nn.Module:  # fmt: skip
    """Distil the trainable weights of a pruned model (eqs. 7-9) in one schedule."""
    model.train()
    trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    objective = Distillation(context.teacher, model, context.source, stage.loss,
                             stage.train.batch_size, context.seed, aliases=aliases)  # fmt: skip
    run_id = fingerprint(name, to_dict(context.config.teacher), context.seed, to_dict(stage),
                         trained, dict(aliases or {}))  # fmt: skip
    train(model, objective, stage.train, context.folder / name / "distill", run_id=run_id,
          label=name, progress=context.progress)  # fmt: skip
    finish_stage(model)
    return model
