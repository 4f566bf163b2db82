"""What `d2m distill`'s YAML may say: one dataclass a section, every key described and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.configs.checked import check_choice, check_least
from distill.configs.training import ParallelConfig, TrainConfig
from distill.errors import ConfigError


@dataclass(frozen=True)
class TeacherConfig:
    """The dense teacher: a digits model trained here, or a saved transformer.

    path: folder or hub name of a saved transformer of one of the families (distill/families/) or
    of its pipeline, or "icons", which comes with the package; then `train` and the sizes are not
    used. dtype: of its weights, "float32" or "bfloat16". lora, lora_scale: a LoRA file that is
    fused into it, such as that of a few-step HyperFLUX. width = heads * head_dim; rope are the
    per-axis rotary dimensions and add up to head_dim.
    """

    path: str | None = None
    dtype: str = "float32"
    lora: str | None = None
    lora_scale: float = 1.0
    num_layers: int = 4
    num_single_layers: int = 8
    heads: int = 4
    head_dim: int = 24
    rope: list[int] = field(default_factory=lambda: [8, 8, 8])
    train: TrainConfig | None = None

    def __post_init__(self):
        if (self.path is None) == (self.train is None):
            raise ConfigError("teacher needs exactly one of the keys 'path' and 'train'")
        check_choice("teacher", "dtype", self.dtype, ("float32", "bfloat16"))
        if self.path is None and (self.lora is not None or self.dtype != "float32"):
            raise ConfigError("teacher.lora and teacher.dtype are for a teacher with a 'path'")
        if sum(self.rope) != self.head_dim or any(r % 2 for r in self.rope):
            raise ConfigError(
                f"teacher.rope is {self.rope}; expected even numbers that add up to "
                f"head_dim={self.head_dim}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Which data: "digits" (scikit-learn's), "photos" (scikit-image's) and "icons" (QtAwesome's)
    are built in, "shards" is a folder that `d2m prepare` wrote.

    timesteps: how noise levels are drawn, see `distill.data.batch.sample_timesteps`.
    timestep_grid: the noise levels, each in (0, 1], for timesteps "grid".

    fonts, words: of the icons, see `distill.data.icons.Icons`. caption_dropout: share of samples
    that get the empty prompt (icons, shards).

    The rest is for shards. folder: theirs. text_encoders: folder or hub name of the pipeline whose
    text encoders run during training; not needed where the embeddings are in the shards.
    max_sequence_length: (T5) tokens a caption. guidance: the scale a guidance-distilled teacher is
    told. prefetch: batches read ahead. verify: compare every shard's SHA-256 at the start.
    max_bad_shards: how many may be damaged before it is an error. The result does not depend on
    these three.
    """

    name: str = "digits"
    timesteps: str = "uniform"
    timestep_grid: list[float] | None = None
    fonts: list[str] = field(default_factory=lambda: ["mdi"])
    words: int | None = None
    folder: str | None = None
    text_encoders: str | None = None
    max_sequence_length: int = 512
    caption_dropout: float = 0.0
    guidance: float = 3.5
    prefetch: int = 2
    verify: bool = False
    max_bad_shards: int = 1

    def __post_init__(self):
        check_choice("data", "name", self.name, ("digits", "photos", "icons", "shards"))
        if (self.name == "shards") != (self.folder is not None):
            raise ConfigError(
                f"data.folder is {self.folder!r} and data.name {self.name!r}; expected the folder "
                "of `d2m prepare` for 'shards', and no folder for any other"
            )
        if self.text_encoders is not None and self.name != "shards":
            raise ConfigError(f"data.text_encoders is for data.name 'shards', not {self.name!r}")
        check_least(
            self, "data", words=1, max_sequence_length=1, caption_dropout=0, prefetch=0,
            max_bad_shards=0,
        )  # fmt: skip
        if not self.caption_dropout <= 1:
            raise ConfigError(f"data.caption_dropout is {self.caption_dropout}; expected 0 to 1")
        kinds = ("uniform", "logit-normal", "flux-shift", "grid")
        check_choice("data", "timesteps", self.timesteps, kinds)
        grid = self.timestep_grid
        if (self.timesteps == "grid") != (grid is not None):
            raise ConfigError(
                "data.timestep_grid is a list of noise levels for data.timesteps 'grid'; "
                f"here it is {grid} and timesteps is {self.timesteps!r}"
            )
        if grid is not None and not (grid and all(0 < t <= 1 for t in grid)):
            raise ConfigError(f"data.timestep_grid is {grid}; expected numbers in (0, 1]")


@dataclass(frozen=True)
class TeacherRun:
    """`d2m teacher`: one small dense FLUX, trained by flow matching on data that is built in.

    start: folder of a saved model of the same sizes, or "icons", whose weights it begins with.
    """

    teacher: TeacherConfig
    data: DataConfig
    start: str | None = None
    out: str = "d2m-teacher"
    seed: int = 0

    def __post_init__(self):
        if self.teacher.path is not None or self.data.name == "shards":
            raise ConfigError("d2m teacher needs teacher.train, and a data.name that is built in")


@dataclass(frozen=True)
class LossConfig:
    """Eq. (10): lambda_feature, lambda_balance; reduction and variant as in losses.py."""

    feature: float = 1.0
    balance: float = 0.01
    feature_reduction: str = "sum"
    balance_variant: str = "auto"

    def __post_init__(self):
        check_choice("loss", "feature_reduction", self.feature_reduction, ("sum", "mean"))
        check_choice(
            "loss", "balance_variant", self.balance_variant, ("auto", "weights", "softmax")
        )
        check_least(self, "loss", feature=0, balance=0)


@dataclass(frozen=True)
class StageConfig:
    """One stage of section 3.2: "shared" (a), "moe" (b) or "mob" (c).

    The paper's way is the default: freeze_shared keeps the shared experts fixed in stage (b);
    train_isolated also trains the blocks outside groups in stage (c).
    """

    stage: str
    train: TrainConfig
    loss: LossConfig = LossConfig()
    freeze_shared: bool = True
    train_isolated: bool = False

    def __post_init__(self):
        check_choice("stages", "stage", self.stage, ("shared", "moe", "mob"))
        if self.train_isolated and self.stage != "mob":
            raise ConfigError(f"stages.train_isolated is for stage 'mob', not {self.stage!r}")
        if not self.freeze_shared and self.stage != "moe":
            raise ConfigError(f"stages.freeze_shared is for stage 'moe', not {self.stage!r}")


@dataclass(frozen=True)
class StudentConfig:
    """The student: a preset name or a structure (the fields of `FluxMoEConfig`, for other families
    than FLUX.1 of `AnyMoEConfig`), never both.

    initialisation: which neurons are shared and which make an expert. "taylor": the paper's, the
    most important ones (eq. 6) are shared, the rest is dealt evenly; "random": the baseline of
    Table 5; "coactivation": shared ones by eq. (6), neurons that fire together make an expert;
    "clusters": of tokens, each with the neurons that serve it most; "copies": clusters that each
    have copies of their most useful neurons, for outputs "refitted".
    routers: they start at "random", the paper's, or "fitted" to what each expert contributes, or to
    the clusters. outputs: w2 and b2 start as the "dense" ones, or "refitted" by least squares, so
    that they make up for what a token's experts leave out; then top_k "dense" is not the teacher.
    tokens: of each FFN that all but "taylor" and "random" are measured on.
    importance_batches: batches of eq. (6), 128 samples each. importance_rows: how many of them go
    through the teacher at once; null for all. calibration: samples of silu(temb) for the AdaLN
    basis.
    """

    preset: str | None = None
    structure: dict[str, Any] | None = None
    initialisation: str = "taylor"
    routers: str = "random"
    outputs: str = "dense"
    tokens: int = 2048
    importance_batches: int = 8
    importance_rows: int | None = None
    calibration: int = 1024

    def __post_init__(self):
        ways = ("taylor", "random", "coactivation", "clusters", "copies")
        check_choice("student", "initialisation", self.initialisation, ways)
        check_choice("student", "outputs", self.outputs, ("dense", "refitted"))
        if self.outputs == "refitted" and self.routers != "fitted":
            raise ConfigError("student.outputs 'refitted' needs student.routers 'fitted'")
        if self.initialisation == "copies" and self.outputs != "refitted":
            raise ConfigError("student.initialisation 'copies' needs student.outputs 'refitted'")
        check_choice("student", "routers", self.routers, ("random", "fitted"))
        if (self.preset is None) == (self.structure is None):
            raise ConfigError("student needs exactly one of the keys 'preset' and 'structure'")
        check_least(
            self, "student", importance_batches=1, importance_rows=1, calibration=1, tokens=2
        )


@dataclass(frozen=True)
class DistillConfig:
    """`d2m distill`: one teacher, one student, its stages in order."""

    teacher: TeacherConfig
    student: StudentConfig
    stages: list[StageConfig]
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    out: str = "d2m-distill"
    seed: int = 0

    def __post_init__(self):
        if not self.stages:
            raise ConfigError("stages is empty; expected at least one of 'shared', 'moe', 'mob'")
        if self.data.name == "shards" and self.teacher.path is None:
            raise ConfigError("data.name 'shards' needs teacher.path, a saved FLUX transformer")
        order = [("shared", "moe", "mob").index(s.stage) for s in self.stages]
        if order != sorted(set(order)):
            raise ConfigError(
                f"stages are {[s.stage for s in self.stages]}; expected each at most once, "
                "in the order shared, moe, mob"
            )
        half = [s.stage for s in self.stages if s.train.compute_dtype == "bfloat16"]
        if self.teacher.dtype == "bfloat16" and len(half) < len(self.stages):
            raise ConfigError(
                "teacher.dtype is 'bfloat16'; expected compute_dtype 'bfloat16' in every stage, as "
                "both models are given the same inputs"
            )
