"""A small student ready to train, and what the tests of the training loop do with it."""

from __future__ import annotations

from helpers.ranks import models

from distill.configs.sections import LossConfig
from distill.configs.training import TrainConfig
from distill.loop.objective import Distillation
from distill.loop.parallel import World
from distill.loop.step import backward
from distill.loop.train import train
from distill.stages import prepare_stage

CONFIG = TrainConfig(steps=4, batch_size=6, lr=1e-3, warmup=0, schedule="constant", log_every=2)


def ready(kind="moe", source=None, loss=None):
    """(student ready to train, frozen slices, objective); always the same weights."""
    teacher, student, digits = models(kind)
    frozen = prepare_stage(student, kind)
    objective = Distillation(
        teacher, student, source or digits, loss or LossConfig(), CONFIG.batch_size, 0
    )
    return student, frozen, objective


def run(made, folder, config=CONFIG, **kwargs):
    student, frozen, objective = made
    options = {"run_id": "id", "label": "test", "progress": False, "frozen": frozen, **kwargs}
    return train(student, objective, config, folder, **options)


def gradients(made, config):
    student, _, objective = made
    parts, loads = backward(objective, 3, config, World())
    grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return parts, loads, grads


def same(grads, expected, share):
    """Equal but for rounding, parameter by parameter."""
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= share * grad.norm() + 1e-9, name
