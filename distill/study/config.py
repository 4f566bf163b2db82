"""What the YAML of `d2m demo` and `d2m ablate` may say beside the sections of `d2m distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.configs.checked import check_choice, check_least
from distill.configs.sections import DataConfig, LossConfig, StageConfig, TeacherConfig
from distill.configs.training import TrainConfig
from distill.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig:
    """How the demo's models are judged.

    prompts: drawn for the report. judged: further prompts, of training icons, that are drawn for
    the share of words read right. sample_steps: Euler's. guidance: see `distill.sampling.sample`.
    held_out: (x_t, t, prompt) triples of held-out icons.
    """

    prompts: list[str]
    judged: int = 24
    sample_steps: int = 12
    guidance: float = 3.0
    held_out: int = 256
    latency_batch: int = 64
    latency_rounds: int = 9

    def __post_init__(self):
        least = ("judged", "sample_steps", "held_out", "latency_batch", "latency_rounds")
        check_least(self, "evaluate", **dict.fromkeys(least, 1))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One teacher, one MoE structure, MoB groupings and the three stages.

    structure: fields of `FluxMoEConfig` without depth and mob. groups: name -> fields of
    `MoBConfig`. importance_batches: of eq. (6).
    """

    teacher: TeacherConfig
    structure: dict[str, Any]
    groups: dict[str, Any]
    shared: StageConfig
    moe: StageConfig
    mob: StageConfig
    importance_batches: int = 8

    def __post_init__(self):
        for name in ("shared", "moe", "mob"):
            stage = getattr(self, name).stage
            if stage != name:
                raise ConfigError(f"{name}.stage is {stage!r}; expected {name!r}")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """`d2m demo`.

    teacher: a saved one. structure: fields of `FluxMoEConfig` without depth and mob; groups: fields
    of `MoBConfig`. start: fields of `StudentConfig`, how the MoE begins; pruned FFNs begin with
    outputs refitted on as many tokens. moe: the one stage of the MoE and of pruned FFNs; mob: of
    the MoB that the MoE becomes and of pruned depth. importance_samples: of every batch of eq. (6).
    """

    teacher: TeacherConfig
    data: DataConfig
    structure: dict[str, Any]
    groups: dict[str, Any]
    start: dict[str, Any]
    moe: StageConfig
    mob: StageConfig
    evaluate: EvalConfig
    importance_batches: int = 2
    importance_samples: int = 128


@dataclass(frozen=True)
class HyperConfig:
    """The step-distilled teacher: as many Euler steps as `grid` has entries (1 first, falling).

    substeps: steps of the original teacher that one of its steps replaces.
    """

    grid: list[float]
    substeps: int
    train: TrainConfig

    def __post_init__(self):
        ends = [*self.grid, 0.0][1:]
        falling = all(a > b for a, b in zip(self.grid, ends, strict=True))
        if not self.grid or self.grid[0] != 1.0 or not falling:
            raise ConfigError(f"hyper.grid is {self.grid}; expected falling numbers from 1 to > 0")
        check_least(self, "hyper", substeps=1)


@dataclass(frozen=True)
class SearchConfig:
    """The learning-rate search that every kind of comparator gets: the same candidates and steps.

    rates: candidates. share: of the comparator's own steps. seed: none of the compared ones.
    """

    rates: list[float]
    share: float = 0.5
    seed: int = 1000


@dataclass(frozen=True)
class AblateEval:
    """held_out: (x_t, t, prompt) triples. per_prompt samples of every picture in sample_steps
    Euler steps, reference_steps for the teacher's own. top_k: tried without training."""

    held_out: int = 256
    per_prompt: int = 2
    sample_steps: int = 8
    reference_steps: int = 24
    top_k: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 12])

    def __post_init__(self):
        # with one sample a prompt, prompts in random order would be the same groups again
        check_least(self, "evaluate", held_out=1, per_prompt=2, sample_steps=2, reference_steps=1)


@dataclass(frozen=True, kw_only=True)
class AblateConfig(StudyConfig):
    """`d2m ablate`.

    structure is 1S12E2A, other 0.5S14E4A. groups: "shallow", "deep", and the groupings of Fig. 5.
    importance_samples: of every batch of eq. (6).
    """

    other: dict[str, Any]
    hyper: HyperConfig
    search: SearchConfig
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    evaluate: AblateEval = AblateEval()
    importance_batches: int = 4
    importance_samples: int = 64

    def __post_init__(self):
        super().__post_init__()
        if not {"shallow", "deep"} <= set(self.groups):
            raise ConfigError(f"groups has {sorted(self.groups)}; expected 'shallow' and 'deep'")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"seeds is {self.seeds}; expected different numbers, at least one")


@dataclass(frozen=True)
class Arm:
    """One way to a cheaper model: "moe" and "prune" (FFNs of as many active neurons as the
    structure's), "mob" and "depth" (as many blocks as run of the groups).

    start: of an MoE, fields of `StudentConfig`; of pruned FFNs and depth, {} or {outputs: refitted}
    (and tokens). routed_scale: of the MoE. shared: share of the steps that the shared experts learn
    alone, after which they are frozen, the paper's way; 0: all learn together. lengths: of the
    study's, null for all.
    """

    kind: str
    start: dict[str, Any] = field(default_factory=dict)
    routed_scale: float = 1.0
    shared: float = 0.0
    router_lr_scale: float = 1.0
    loss: LossConfig = LossConfig(feature=0.0)
    train_isolated: bool = True
    lengths: list[int] | None = None

    def __post_init__(self):
        check_choice("arms", "kind", self.kind, ("moe", "prune", "mob", "depth"))


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """`d2m ablate --recipes`: arms that start and train in different ways, at equal cost.

    teacher, data: of the arms. structure: fields of `FluxMoEConfig` without depth and mob; groups:
    fields of `MoBConfig`. train: of length 1; lengths multiply its steps. importance_batches,
    importance_samples: of eq. (6) and of fitted starts; arms without one train `calibration_steps`
    more, what fitting costs. rates: each arm tries them for `train.steps` on seed `search_seed`,
    judged on new noise of the training data; at lengths above 1 it keeps the best.
    """

    teacher: TeacherConfig
    data: DataConfig
    structure: dict[str, Any]
    groups: dict[str, Any]
    train: TrainConfig
    arms: dict[str, Arm]
    rates: list[float]
    calibration_steps: int
    seeds: list[int]
    lengths: list[int]
    importance_batches: int = 2
    importance_samples: int = 128
    held_out: int = 512
    search_seed: int = 1000

    def __post_init__(self):
        own = {"held_out": 1, "importance_batches": 1, "calibration_steps": 0}
        check_least(self, "recipes", **own)
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds or 1 not in self.lengths:
            raise ConfigError(f"seeds are {self.seeds}, lengths {self.lengths}; expected different "
                              "seeds, at least one, and lengths with 1")  # fmt: skip
