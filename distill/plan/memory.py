"""`d2m distill --plan`: what a run needs, before anything is loaded.

Models are built without memory (meta device). Weights, gradients, optimizer state and averages are
counted parameter by parameter; activations are what autograd would keep, found by running the
objective itself on tensors that have shapes but no data.

Shapes: b samples a GPU computes at once, S image tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from d2m_models.config import named_blocks
from d2m_models.conversion.flux import skeleton
from distill.configs.sections import DistillConfig, StageConfig
from distill.data.digits import Digits
from distill.data.photos import Photos
from distill.errors import ConfigError
from distill.plan.skeleton import activations, teacher_skeleton
from distill.stages import prepare_stage

FP32 = 4
# T5-XXL's encoder and CLIP-L's text model in bf16, on every GPU; counted from their configurations
TEXT_ENCODERS = 2 * (4_762_310_656 + 123_060_480)


@dataclass(frozen=True)
class Memory:
    """Bytes a GPU, by kind, and the most that is held at once.

    peak: of a step. Gradients grow as activations go, so both together are less than their sum.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    teacher: int
    text_encoders: int
    gathered: int
    activations: int
    peak: int


@dataclass(frozen=True)
class StagePlan:
    """One stage. flops: of a sample, both models, backward and recomputation included."""

    stage: str
    trained: int
    memory: Memory
    flops: float
    steps: int
    samples: int


# --- a stage --------------------------------------------------------------------------------


def _bytes(parameters: Iterator[nn.Parameter] | list[nn.Parameter], each: int | None = None) -> int:
    return sum(p.numel() * (each or p.element_size()) for p in parameters)


def state_bytes(trained: list[nn.Parameter], optimizer: str) -> int:
    """Both moments of AdamW: fp32, or a byte each and an fp32 scale for every 256 (torchao)."""
    if optimizer == "adamw":
        return _bytes(trained, 2 * FP32)
    # torchao keeps small or oddly sized tensors in fp32
    coded = [p for p in trained if p.numel() >= 4096 and p.numel() % 256 == 0]
    rest = [p for p in trained if p.numel() < 4096 or p.numel() % 256]
    return _bytes(coded, 2) + 2 * FP32 * _bytes(coded, 1) // 256 + _bytes(rest, 2 * FP32)


def plan_stage(
    teacher: nn.Module,
    student: nn.Module,
    stage: StageConfig,
    *,
    shard: int,
    gpus: int,
    image_tokens: int,
    text_tokens: int,
    text_encoders: int = 0,
) -> StagePlan:
    """What a stage needs of each of `gpus` GPUs, over `shard` of which parameters are sharded."""
    train = stage.train
    prepare_stage(
        student, stage.stage, freeze_shared=stage.freeze_shared, train_isolated=stage.train_isolated
    )
    if train.batch_size % gpus:
        raise ConfigError(
            f"train.batch_size is {train.batch_size}; expected a multiple of the {gpus} GPUs"
        )
    share = train.batch_size // gpus
    at_once = min(train.micro_batch or share, share)
    parts = -(-share // at_once)
    trained = [p for p in student.parameters() if p.requires_grad]
    kept, inside = activations(teacher, student, stage, at_once, image_tokens, text_tokens)
    blocks = named_blocks(student).values()
    gradients = [_bytes([p for p in b.parameters() if p.requires_grad]) for b in blocks]
    whole = _bytes(trained)
    gathered = 0
    if shard > 1:
        gathered = _gathered(student) + _gathered(teacher)
        gathered += 2 * max(gradients)  # a block's whole gradient, and what is being scattered
    memory = {
        "weights": _bytes(student.parameters()) // shard,
        "gradients": whole // shard,
        "optimizer": state_bytes(trained, train.optimizer) // shard,
        "ema": whole // shard if train.ema else 0,
        "teacher": _bytes(teacher.parameters()) // shard,
        "text_encoders": text_encoders,
        "gathered": gathered,
        "activations": kept[-1] + inside,
    }
    moving_kinds = ("gradients", "activations")
    static = sum(v for k, v in memory.items() if k not in moving_kinds)
    moving = _backward_peak(kept, gradients, whole, inside, shard, before=parts > 1)
    return StagePlan(
        stage=stage.stage,
        trained=sum(p.numel() for p in trained),
        memory=Memory(**memory, peak=static + moving),
        flops=sample_flops(teacher, student, train, parts, image_tokens, text_tokens),
        steps=train.steps,
        samples=train.batch_size,
    )


def _backward_peak(
    kept: list[int], gradients: list[int], whole: int, inside: int, shard: int, before: bool
) -> int:
    """The most that activations and gradients take together.

    The backward pass goes through the blocks from the last to the first; at block i what blocks
    0..i keep is still there, and the gradients of blocks i.. are. With several parts a step the
    gradients of earlier parts are there all the time.
    """
    if before:
        return kept[-1] + inside + whole // shard
    peak, done = kept[-1], whole - sum(gradients)
    for i in reversed(range(len(gradients))):
        done += gradients[i]
        peak = max(peak, kept[i] + inside + done // shard)
    return max(peak, whole // shard)


def _gathered(model: nn.Module) -> int:
    """Whole parameters that FSDP holds at once: those of no block, and two blocks."""
    each = sorted(_bytes(list(b.parameters())) for b in named_blocks(model).values())
    return _bytes(model.parameters()) - sum(each) + sum(each[-2:])


def sample_flops(
    teacher: nn.Module, student: nn.Module, train: Any, parts: int, image: int, text: int
) -> float:
    """FLOPs of the matrix products of a training step, a sample.

    Student: forward, twice that backward, forward again where blocks are recomputed. Teacher:
    forward. With several parts a step both run forward once more, for the statistics.
    """
    from d2m_models import account

    sizes = {"image_tokens": image, "text_tokens": text}
    own, known = account(student, **sizes).flops, account(teacher, **sizes).flops
    more = parts > 1
    return own * (3 + train.gradient_checkpointing + more) + known * (1 + more)


# --- a run ----------------------------------------------------------------------------------


def plan(
    config: DistillConfig,
    gpus: int | None = None,
    size: int = 1024,
    say: Callable[[str], None] = lambda text: None,
) -> list[StagePlan]:
    """Every stage of a run.

    Args:
        gpus: processes; by default parallel.shard x parallel.replicate.
        size: side of the (square) images in pixels; built-in data has its own.
        say: is told what is being done.
    """
    from distill.pipeline import student_structure

    parallel = config.parallel
    gpus = gpus or (parallel.shard or 1) * parallel.replicate
    shard = parallel.shard or gpus // parallel.replicate
    if shard * parallel.replicate != gpus:
        raise ConfigError(
            f"parallel.shard x parallel.replicate is {shard} x {parallel.replicate}; expected the "
            f"number of GPUs, {gpus}"
        )
    image, text = token_counts(config, size)
    teacher = teacher_skeleton(config.teacher).requires_grad_(False)
    structure = student_structure(config, teacher)
    plans = []
    for number, stage in enumerate(config.stages, 1):
        say(f"counting stage {number} of {len(config.stages)}, {stage.stage}: no weights are read")
        now = structure if stage.stage == "mob" else replace(structure, mob=None)
        student = skeleton(teacher, now)
        sizes = {"shard": shard, "gpus": gpus, "image_tokens": image, "text_tokens": text}
        encoders = TEXT_ENCODERS if config.data.text_encoders else 0
        plans.append(plan_stage(teacher, student, stage, text_encoders=encoders, **sizes))
    return plans


def token_counts(config: DistillConfig, size: int) -> tuple[int, int]:
    """(image, text) tokens of a sample; a token is 16 x 16 pixels."""
    if source := {"digits": Digits, "photos": Photos}.get(config.data.name):
        return source.image_tokens, source.text_tokens
    return (size // 16) ** 2, config.data.max_sequence_length


def render(plans: list[StagePlan], gpus: int, tflops: float) -> str:
    """The table that `d2m distill --plan` prints."""
    large = max(p.memory.peak for p in plans) >= 2**30
    unit, name = (2**30, "GiB") if large else (2**20, "MiB")
    lines = [f"{gpus} GPU{'s' * (gpus > 1)}; memory a GPU in {name}"]
    lines.append(f"{'':14}" + "".join(f"{p.stage:>12}" for p in plans))
    for kind in Memory.__dataclass_fields__:
        values = [getattr(p.memory, kind) / unit for p in plans]
        lines.append(f"{kind:14}" + "".join(f"{v:12.2f}" for v in values))
    lines.append(f"{'trained, B':14}" + "".join(f"{p.trained / 1e9:12.4f}" for p in plans))
    lines.append(f"{'TFLOP/sample':14}" + "".join(f"{p.flops / 1e12:12.4g}" for p in plans))
    hours = [p.steps * p.samples * p.flops / (tflops * 1e12 * gpus) / 3600 for p in plans]
    lines.append(f"{'hours':14}" + "".join(f"{h:12.2f}" for h in hours))
    lines.append(f"{sum(hours):.2f} hours in all at {tflops:g} TFLOP/s a GPU")
    return "\n".join(lines)
