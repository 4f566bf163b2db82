"""Models and batches without memory, and what autograd would keep of them.

For `d2m distill --plan`: models are built on the meta device, and the objective itself runs on
tensors that have shapes but no data.

Shapes: b samples a GPU computes at once, S image tokens, L text tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.config import group_names, named_blocks
from d2m_models.output import watched
from d2m_models.private import fake_mode, storage_key
from distill.configs.sections import StageConfig, TeacherConfig
from distill.data.batch import Batch
from distill.errors import UserError
from distill.families.flux import Flux
from distill.families.registry import find_family
from distill.loop.objective import Distillation
from distill.loop.step import autocast
from distill.plan.shorter import Unit, fewer, shortened, spread, units

# --- models without memory ------------------------------------------------------------------


def teacher_skeleton(config: TeacherConfig) -> nn.Module:
    """The teacher on the meta device; a hub name stands for FLUX.1 [dev]."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        if config.path is None:
            from distill.teacher import build_teacher

            return build_teacher(config, 0)
        folder = Path(config.path)
        for at in (folder / "transformer", folder):
            if (at / "config.json").is_file():
                found = FluxTransformer2DModel.load_config(at)
                if not isinstance(find_family(found["_class_name"])(), Flux):
                    raise UserError(f"--plan counts FLUX.1 alone; {at} is a {found['_class_name']}")
                model = FluxTransformer2DModel.from_config(found)
                break
        else:
            model = FluxTransformer2DModel(guidance_embeds=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return model


class _Shapes:
    """A source whose batches have no content."""

    def __init__(self, teacher: nn.Module, image_tokens: int, text_tokens: int):
        self.config, self.image, self.text = teacher.config, image_tokens, text_tokens

    def batch(self, seed, step, count, stream="train", rows=None) -> Batch:
        n, c = (count if rows is None else rows.stop - rows.start), self.config
        return Batch(
            x0=torch.zeros(n, self.image, c.in_channels),
            noise=torch.zeros(n, self.image, c.in_channels),
            t=torch.zeros(n),
            text=torch.zeros(n, self.text, c.joint_attention_dim),
            pooled=torch.zeros(n, c.pooled_projection_dim),
            labels=torch.zeros(n, dtype=torch.long),
            img_ids=torch.zeros(self.image, 3),
            txt_ids=torch.zeros(self.text, 3),
            guidance=torch.zeros(n) if c.guidance_embeds else None,
        )


# --- activations ----------------------------------------------------------------------------


@contextmanager
def _blocks_in_turn() -> Iterator[None]:
    """Samples run the blocks of a group in turn: routers have no data to choose by."""
    from d2m_models.mob import MixtureOfBlocks, MoBRouting

    route = MixtureOfBlocks.route

    def fixed(self, x, c, y, group=None):
        probs = route(self, x, c, y, group).probs
        return MoBRouting(probs, _InTurn(x.shape[0], self.size, self.active, x.device))

    MixtureOfBlocks.route = fixed
    try:
        yield
    finally:
        MixtureOfBlocks.route = route


class _InTurn:
    """Stands for ids [B, kappa]: sample b runs the blocks b, b + 1, ... of the group's m."""

    def __init__(self, batch: int, size: int, active: int, device: Any):
        self.chosen = [sorted((b + k) % size for k in range(active)) for b in range(batch)]
        self.device, self.shape = device, (batch, active)

    def tolist(self) -> list[list[int]]:
        return self.chosen

    def long(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self.chosen)


class Kept:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out.

    marks: block -> bytes when it had run, in the order of running.
    """

    def __init__(self, *models: nn.Module):
        self.parameters = {storage_key(p) for model in models for p in model.parameters()}
        self.storages: dict[int, Any] = {}
        self.bytes = 0
        self.marks: dict[str, int] = {}

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Counts what runs inside."""

        def mark(name: str, *_: Any) -> None:
            self.marks[name] = self.bytes

        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        with watched(model, mark), hooks:
            yield

    def pack(self, tensor: Tensor) -> Tensor:
        key, storage = storage_key(tensor), tensor.untyped_storage()
        if key not in self.parameters and key not in self.storages:
            self.storages[key] = storage  # alive, so that its address is not used again
            self.bytes += storage.nbytes()
        return tensor


def activations(
    teacher: nn.Module,
    student: nn.Module,
    stage: StageConfig,
    samples: int,
    image_tokens: int,
    text_tokens: int,
) -> tuple[list[int], int]:
    """(bytes kept after each block and at the end, bytes of one more block's inside).

    The second is what gradient checkpointing recomputes; 0 without it. Of blocks that are alike in
    a row three are run and the others take what the second keeps. What the loss keeps of one is
    the difference to a model that has one less.
    """
    whole = units(student.d2m_config)

    def run(kept: list[Unit], recompute: bool) -> tuple[list[int], int, int]:
        models = [shortened(model, kept) for model in (teacher, student)]
        return _kept(*models, stage, samples, image_tokens, text_tokens, recompute)

    most = fewer(whole)
    after, loss, inside = run(most, stage.train.gradient_checkpointing)
    added = loss
    for unit in (u for u in most if u.repeat > 1):
        if stage.stage != "mob" or unit.grouped:  # others the loss does not compare
            without = fewer(whole, unit.signature)
            each = (loss - run(without, False)[1]) / (len(most) - len(without))
            added += round(each * (unit.repeat - 1))
    after = spread(after, most)
    return [*after, after[-1] + added], inside


def _kept(
    teacher: nn.Module,
    student: nn.Module,
    stage: StageConfig,
    samples: int,
    image: int,
    text: int,
    recompute: bool,
) -> tuple[list[int], int, int]:
    """Bytes after each block, what the loss adds, and the inside of a block, all by running."""
    source = _Shapes(teacher, image, text)
    features = list(group_names(student.d2m_config)) if stage.stage == "mob" else None
    inside = 0
    copies = [deepcopy(m) for m in (teacher, student)]
    with fake_mode(), _blocks_in_turn(), warnings.catch_warnings():
        # of a norm in fp32 on bf16, which costs time where it is run and memory nowhere
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        copies = [_fill(m) for m in copies]
        model, kept = copies[1], Kept(*copies)
        objective = Distillation(*copies, source, stage.loss, samples, 0, 0, features)
        if stage.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        with kept.counting(model), autocast(stage.train, torch.device("cpu")):
            terms = objective.terms(objective.batch(0))
            objective.loss(terms, terms.statistics)
        if recompute:
            inside = _largest_inside(model, objective, stage)
    after: list[int] = []
    for name in named_blocks(model):  # one that does not run keeps nothing
        after.append(kept.marks.get(name, after[-1] if after else 0))
    return after, kept.bytes - after[-1], inside


def _fill(model: nn.Module) -> nn.Module:
    """Fake CPU tensors in place of meta ones, in place; call it under FakeTensorMode."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = torch.empty(p.shape, dtype=p.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=p.requires_grad))
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
    return model


def _largest_inside(model: nn.Module, objective: Distillation, stage: StageConfig) -> int:
    """Bytes that a block keeps while it is recomputed: the largest block's."""
    model.disable_gradient_checkpointing()
    kept = Kept(model)
    with kept.counting(model), autocast(stage.train, torch.device("cpu")):
        model(**objective.batch(0).inputs(), output_aux=True)
    return max(b - a for a, b in pairwise([0, *kept.marks.values()]))
