"""Expert formation and router initialisation on the demo's teacher, the paper's way and others.

    python benchmarks/formation.py --steps 200 --seeds 3

Relative MSE of the student's velocity on held-out digits, before training and along plain knowledge
distillation (AdamW on the output, every variant with the same batches).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from d2m_models import (
    FluxMoEConfig,
    convert_flux,
    neuron_order_from_importance,
    random_neuron_order,
)
from d2m_models.conversion.formation import coactivation_orders, fit_routers, record_ffns
from distill.configs.checked import bundled, load_config
from distill.data.digits import Digits
from distill.students import measure_importance
from distill.study import measure as ev
from distill.study.config import DemoConfig
from distill.teacher import load_teacher

MARKS = (0, 25, 50, 100, 200, 400)


def variants(teacher, moe, importance, records, seed):
    """name -> (orders, routers from data, routed_scale)"""
    shared, _ = moe.sizes(teacher.inner_dim, 4 * teacher.inner_dim)
    paper = {
        n: neuron_order_from_importance(s, shared, moe.num_experts) for n, s in importance.items()
    }
    g = torch.Generator().manual_seed(seed)
    random = {n: random_neuron_order(len(s), shared, moe.num_experts, g) for n, s in paper.items()}
    fired = coactivation_orders(records, importance, moe)
    k = float(moe.top_k)
    return {
        "random split": (random, False, 1.0),
        "paper: Taylor, random router": (paper, False, 1.0),
        f"paper, routed_scale {k:g}": (paper, False, k),
        "paper, fitted router": (paper, True, 1.0),
        "co-activation, random router": (fired, False, 1.0),
        "co-activation, fitted router": (fired, True, 1.0),
        f"co-activation, fitted, scale {k:g}": (fired, True, k),
    }


def distil(teacher, student, digits, held_out, target, steps, seed, lr):
    """{step: relative MSE} of plain output distillation."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    curve = {}
    for step in range(steps + 1):
        if step in MARKS or step == steps:
            curve[step] = ev.relative_mse(target, ev.predict(student.eval(), held_out))
        if step == steps:
            return curve
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        student.train()
        inputs = digits.batch(seed, step, 32).inputs()
        with torch.no_grad():
            wanted = teacher(**inputs).sample
        loss = (student(**inputs).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="demo-quick.yaml", help="a demo configuration")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    args = parser.parse_args()
    config = load_config(DemoConfig, bundled(args.config))
    curves: dict[str, list[dict[int, float]]] = {}
    for seed in range(args.seeds):
        teacher = load_teacher(config.teacher, config.data, seed)
        digits, test = Digits("train", config.data.timesteps), Digits("test")
        held_out = ev.held_out_batch(test, config.evaluate.held_out, seed)
        target = ev.predict(teacher, held_out)
        importance = measure_importance(teacher, digits, config.importance_batches, seed)
        batches = [digits.batch(seed, i, 64, "calibrate").inputs() for i in range(8)]
        records = record_ffns(teacher, batches)
        depth = {
            "num_layers": config.teacher.num_layers,
            "num_single_layers": config.teacher.num_single_layers,
        }
        given = {**config.structure, **depth, "mob": None, "adaln_dim": None}
        structure = FluxMoEConfig.from_dict(given)
        moe = structure.moe
        for name, (orders, fitted, scale) in variants(
            teacher, moe, importance, records, seed
        ).items():
            if args.only not in name:
                continue
            scaled = replace(structure, moe=replace(moe, routed_scale=scale))
            student = convert_flux(
                teacher, scaled, orders, generator=torch.Generator().manual_seed(seed)
            ).requires_grad_(True)
            if fitted:
                fit_routers(student, records)
            curve = distil(teacher, student, digits, held_out, target, args.steps, seed, args.lr)
            curves.setdefault(name, []).append(curve)
            print(seed, name, {s: round(v, 5) for s, v in curve.items()}, flush=True)
    steps = list(next(iter(curves.values()))[0])
    print(f"\n{'relative MSE after steps':34}" + "".join(f"{s:>10}" for s in steps))
    for name, runs in curves.items():
        means = [sum(run[s] for run in runs) / len(runs) for s in steps]
        print(f"{name:34}" + "".join(f"{m:>10.5f}" for m in means))


if __name__ == "__main__":
    main()
