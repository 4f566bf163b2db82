"""The models that `d2m demo` and `d2m ablate` compare: how each comes from the teacher and trains.

teacher --eq. 6--> MoE (stages a, b) --> MoB (stage c), which may also begin from dense blocks
   |                 '--> pruned depth: one block of each group stays
   '--> pruned width: as many FFN neurons as a token of the MoE activates

Comparators of one seed see the same batches in the same order. What a command's cached results
depend on it says itself: `parent` and `run_id` are its fingerprints.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.config import KINDS
from d2m_models.conversion.grouping import measure_block_mse
from distill.configs.sections import StageConfig, StudentConfig
from distill.configs.training import first_batch
from distill.data.batch import Batch
from distill.loop.train import train
from distill.stages import Distillation, finish_stage, run_stage
from distill.students import (
    group_blocks,
    make_student,
    measure,
    measure_importance,
    refit_outputs,
)
from distill.study.config import DemoConfig, RecipeConfig, StudyConfig
from distill.study.measure import predict, relative_mse
from distill.teacher import modulation_inputs


@dataclass(frozen=True)
class Context:
    """One seed's teacher, data and folder.

    rates: learning rates by kind of comparator, where not the stage's own. share: of every
    training's steps. importance_samples: of a batch of eq. (6). calibration: samples for the AdaLN
    basis, None for random ones.
    """

    config: StudyConfig | DemoConfig | RecipeConfig
    seed: int
    folder: Path
    teacher: nn.Module
    source: Any
    rates: Mapping[str, float] = field(default_factory=dict)
    share: float = 1.0
    progress: bool = False
    importance_samples: int = 128
    calibration: int | None = None

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """Eq. (6) on this seed's calibration data."""
        return measure_importance(self.teacher, self.source, self.config.importance_batches,
                                  self.seed, size=self.importance_samples)  # fmt: skip

    def temb(self, structure: Any) -> Tensor | None:
        """Calibration samples of the AdaLN basis; None where AdaLN stays whole."""
        if structure.adaln_dim is None or self.calibration is None:
            return None
        return modulation_inputs(self.teacher, self.source, self.calibration, self.seed)

    def structure(self, fields: Mapping[str, Any]) -> Any:
        """`FluxMoEConfig` as deep as the teacher."""
        from d2m_models import FluxMoEConfig

        counts = {
            "num_layers": len(self.teacher.transformer_blocks),
            "num_single_layers": len(self.teacher.single_transformer_blocks),
        }
        return FluxMoEConfig.from_dict({**fields, **counts})

    def stage(self, config: StageConfig, kind: str, **changes: Any) -> StageConfig:
        """A stage with this kind's learning rate, and its steps times `share`."""
        own = config.train
        steps = max(1, round(changes.pop("steps", own.steps) * self.share))
        tuned = replace(own, steps=steps, lr=self.rates.get(kind, own.lr))
        return replace(config, train=tuned, **changes)

    def dense(self, structure: Any) -> nn.Module:
        """The teacher as a model of ours, with AdaLN compressed as the structure says."""
        from d2m_models import convert_flux

        return convert_flux(
            self.teacher, replace(structure, moe=None), adaln_calibration=self.temb(structure)
        )


# --- students -------------------------------------------------------------------------------


def train_stage(
    context: Context, model: nn.Module, name: str, stage: StageConfig, parent: str,
    before: Sequence[StageConfig] = (),
) -> str:  # fmt: skip
    """Train one stage, on the batches behind those of the stages `before`; returns the fingerprint
    of its result."""
    letter = {"shared": "a", "moe": "b", "mob": "c"}[stage.stage]
    return run_stage(
        model, context.teacher, context.source, stage, context.folder / name / stage.stage,
        seed=context.seed, parent=parent, progress=context.progress,
        first=first_batch([s.train for s in before], stage.train.batch_size),
        label=f"{name}: ({letter}) {stage.stage}",
    )  # fmt: skip


def train_moe(
    context: Context, name: str, structure: Any, stages: Sequence[StageConfig], parent: str,
    *, start: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, str, nn.Module | None]:  # fmt: skip
    """(model, fingerprint, the model after stage (a) with shared experts only, if there was one).

    start: see `start_moe`.
    """
    from d2m_models import set_top_k

    model, shared = start_moe(context, structure, start or {}), None
    for number, stage in enumerate(stages):
        parent = train_stage(context, model, name, stage, parent, stages[:number])
        if stage.stage == "shared":
            shared = copy.deepcopy(model)
            set_top_k(shared, 0)
    return model, parent, shared


def start_moe(context: Context, structure: Any, start: Mapping[str, Any]) -> nn.Module:
    """An MoE before its first stage. start: fields of `StudentConfig`; by default the paper's."""
    known = {"importance_batches": context.config.importance_batches, "structure": {}}
    config = StudentConfig(**{**known, **start})
    how = measure(context.teacher, context.source, structure, config, context.seed,
                  size=context.importance_samples)  # fmt: skip
    return make_student(context.teacher, structure, temb=context.temb(structure),
                        seed=context.seed, **how)  # fmt: skip


def train_mob(
    context: Context, model: nn.Module, name: str, groups: Mapping[str, Any], stage: StageConfig,
    parent: str, before: Sequence[StageConfig] = (),
) -> tuple[nn.Module, str]:  # fmt: skip
    """Stage (c): (a copy of the model with its blocks grouped, fingerprint)."""
    grouped = mob_of(context, model, groups)
    return grouped, train_stage(context, grouped, name, stage, parent, before)


def mob_of(context: Context, model: nn.Module, groups: Mapping[str, Any]) -> nn.Module:
    """A copy of the model with its blocks grouped. groups: fields of `MoBConfig`."""
    from d2m_models import MoBConfig

    return group_blocks(model, MoBConfig.from_dict(groups), context.seed)


# --- pruned models --------------------------------------------------------------------------


def prune_width(
    context: Context, structure: Any, ratio: float, refit: int | None = None
) -> nn.Module:
    """Diff-Pruning: the ratio * D neurons of highest score (6) in every FFN that is MoE in the
    structure. refit: tokens of an FFN on which w2 and b2 are set by least squares, as a mixture's.

    AdaLN is compressed as in the MoE, so that at its r_a both activate the same parameters but for
    the routers.
    """
    from d2m_models import prune_mlp

    width = round(ratio * context.teacher.inner_dim)
    whole = {f"transformer_blocks.{i}" for i in structure.dense_double_blocks}
    whole |= {f"single_transformer_blocks.{i}" for i in structure.dense_single_blocks}
    keep = {
        name: score.argsort(descending=True, stable=True)[:width]
        for name, score in context.importance.items()
        if ".".join(name.split(".")[:2]) not in whole
    }
    pruned = prune_mlp(context.dense(structure), keep)
    if refit is not None:
        sizes = (context.config.importance_batches, context.seed, None, context.importance_samples)
        refit_outputs(context.teacher, pruned, context.source, keep, refit, *sizes)
    return pruned.requires_grad_(True)


def prune_groups(
    context: Context, model: nn.Module, groups: Mapping[str, Any], batch: Batch, method: str = "bk"
) -> tuple[nn.Module, dict[str, str]]:
    """The model as deep as a MoB model with these groups runs: one block stays of each group; and
    `aliases` for `distil`.

    method "bk" (BK-SDM): the block without whose companions the output changes least; then all
    weights train. "lite" (FLUX.1-Lite): the block that changes its input most; then only the blocks
    that now stand for a group train, the rest is frozen.
    """
    from d2m_models import MoBConfig, prune_depth

    mob = MoBConfig.from_dict(groups)
    own = {"double": mob.double_groups, "single": mob.single_groups}
    kept = choose_blocks(context, model, own, batch, method)
    pruned = prune_depth(model, kept["double"], kept["single"]).requires_grad_(method == "bk")
    aliases = {}
    for kind, prefix in KINDS.items():
        aliases |= last_blocks(prefix, kept[kind], own[kind])
        for new, old in enumerate(kept[kind]):
            if any(old in group for group in own[kind]):
                getattr(pruned, prefix)[new].requires_grad_(True)
    return pruned, aliases


def choose_blocks(
    context: Context, model: nn.Module, groups: Mapping[str, Any], batch: Batch, method: str
) -> dict[str, list[int]]:
    """{"double", "single"}: blocks that depth pruning keeps, one of each group."""
    from d2m_models import prune_depth

    kept = {kind: list(range(len(getattr(model, prefix)))) for kind, prefix in KINDS.items()}
    target = predict(context.teacher, batch)
    for kind, own in groups.items():
        if method == "lite":
            change = measure_block_mse(context.teacher, [batch.inputs()]).values[kind]
        for group in own:
            cost = {}
            for block in group:
                trial = {**kept, kind: [b for b in kept[kind] if b == block or b not in group]}
                if method == "lite":
                    cost[block] = -float(change[:, block].mean()), trial
                else:
                    output = predict(prune_depth(model, trial["double"], trial["single"]), batch)
                    cost[block] = relative_mse(target, output), trial
            kept = min(cost.values(), key=lambda pair: pair[0])[1]
    return kept


def last_blocks(
    prefix: str, kept: Sequence[int], groups: Sequence[Sequence[int]]
) -> dict[str, str]:
    """Pruned model's block -> the teacher's whose output it is to give: the last one of its group,
    as in stage (c)."""
    last = {block: group[-1] for group in groups for block in group}
    return {f"{prefix}.{new}": f"{prefix}.{last.get(old, old)}" for new, old in enumerate(kept)}


def distil(
    context: Context, model: nn.Module, name: str, stage: StageConfig, run_id: str,
    aliases: Mapping[str, str] | None = None, before: Sequence[StageConfig] = (),
) -> nn.Module:  # fmt: skip
    """Distil the trainable weights of a pruned model (eqs. 7-9) in one schedule."""
    model.train()
    first = first_batch([s.train for s in before], stage.train.batch_size)
    objective = Distillation(context.teacher, model, context.source, stage.loss,
                             stage.train.batch_size, context.seed, first,
                             aliases=aliases)  # fmt: skip
    train(model, objective, stage.train, context.folder / name / "distill", run_id=run_id,
          label=name, progress=context.progress)  # fmt: skip
    finish_stage(model)
    return model
