"""Expert formation and router initialisation on the demo's teacher, the paper's way and others.

    python benchmarks/formation.py --steps 200 --seeds 3

Relative MSE of the student's velocity on held-out digits, before training and along plain output
distillation (eq. 7 alone, in the loop of `d2m distill`, every variant with the same batches).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from distill.configs.checked import load_config
from distill.configs.sections import LossConfig, StudentConfig
from distill.configs.training import TrainConfig
from distill.data.batch import held_out_batch
from distill.data.digits import Digits
from distill.loop.objective import Distillation
from distill.loop.train import train
from distill.students import make_student, measure
from distill.study.comparators import Context
from distill.study.config import DemoConfig
from distill.study.demo import start
from distill.study.measure import predict, relative_mse

MARKS = (0, 25, 50, 100, 200, 400)


def variants(k: float) -> dict[str, tuple[str, str, float]]:
    """name -> (initialisation, routers, routed_scale)"""
    return {
        "random split": ("random", "random", 1.0),
        "paper: Taylor, random router": ("taylor", "random", 1.0),
        f"paper, routed_scale {k:g}": ("taylor", "random", k),
        "paper, fitted router": ("taylor", "fitted", 1.0),
        "co-activation, random router": ("coactivation", "random", 1.0),
        "co-activation, fitted router": ("coactivation", "fitted", 1.0),
        f"co-activation, fitted, scale {k:g}": ("coactivation", "fitted", k),
    }


def distil(
    context: Context, student: nn.Module, error: Callable[[nn.Module], float], config: TrainConfig
) -> dict[int, float]:
    """{step: error(student)} at MARKS and at the end."""
    loss, curve = LossConfig(feature=0.0, balance=0.0), {}
    distillation = Distillation(context.teacher, student, context.source, loss, config.batch_size,
                                context.seed)  # fmt: skip

    def objective(step: int) -> dict[str, Tensor]:
        if step in MARKS:
            curve[step] = error(student)
        return distillation(step)

    student.train().requires_grad_(True)
    with TemporaryDirectory() as folder:
        train(student, objective, config, folder, run_id="", label="", progress=False)
    return curve | {config.steps: error(student)}


def compare(
    config: DemoConfig, training: TrainConfig, seed: int, only: str
) -> Iterator[tuple[str, dict[int, float]]]:
    """(name, curve) of the variants whose name contains `only`."""
    with TemporaryDirectory() as folder:  # where nothing is written: no stage is run
        context = start(config, seed, "cpu", Path(folder), progress=False)
    held_out = held_out_batch(Digits("test"), config.evaluate.held_out, seed)
    target = predict(context.teacher, held_out)
    structure = context.structure({**config.structure, "mob": None, "adaln_dim": None})
    for name, (initialisation, routers, scale) in variants(float(structure.moe.top_k)).items():
        if only in name:
            scaled = replace(structure, moe=replace(structure.moe, routed_scale=scale))
            way = StudentConfig("-", None, initialisation, routers, importance_batches=4)
            how = measure(context.teacher, context.source, scaled, way, seed)
            student = make_student(
                context.teacher, scaled, temb=None, seed=seed,
                **how | {"importance": context.importance},
            )  # fmt: skip
            yield (
                name,
                distil(
                    context, student, lambda m: relative_mse(target, predict(m, held_out)), training
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="demo-quick.yaml", help="a demo configuration")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    args = parser.parse_args()
    config = load_config(DemoConfig, args.config)
    training = TrainConfig(args.steps, 32, args.lr, weight_decay=0.0, log_every=args.steps)
    curves: dict[str, list[dict[int, float]]] = {}
    for seed in range(args.seeds):
        for name, curve in compare(config, training, seed, args.only):
            curves.setdefault(name, []).append(curve)
            print(seed, name, {s: round(v, 5) for s, v in curve.items()}, flush=True)
    steps = list(next(iter(curves.values()))[0])
    print(f"\n{'relative MSE after steps':34}" + "".join(f"{s:>10}" for s in steps))
    for name, runs in curves.items():
        print(f"{name:34}" + "".join(f"{mean(run[s] for run in runs):>10.5f}" for s in steps))


if __name__ == "__main__":
    main()
