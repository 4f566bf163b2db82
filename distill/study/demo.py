"""`d2m demo`: teacher -> MoE -> MoB on real digits, next to pruning, measured and reported."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill.configs.checked import bundled, load_config, to_dict
from distill.data.digits import Digits
from distill.loop.train import read_log
from distill.stages import VERSION
from distill.study import demo_page
from distill.study import measure as ev
from distill.study.comparators import Run, start, train_all
from distill.study.config import DemoConfig

# --- measuring ------------------------------------------------------------------------------


@dataclass
class Outcome:
    """All models of one seed with what was measured of them, and tensors for the report."""

    models: dict[str, nn.Module]
    rows: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def kind_of(name: str) -> str:
    return {"moe-l": "moe", "lite": "prune-depth"}.get(
        name, "mob" if name.startswith("mob") else name
    )


def measure(run: Run, models: dict[str, nn.Module]) -> Outcome:
    """Fill the table: accounts, relative MSE on held-out data, class accuracy, latency."""
    from d2m_models import account

    config = run.config.evaluate
    held_out = ev.held_out_batch(run.test, config.held_out, run.seed)
    noise = run.test.noise_batch(run.seed, config.per_class)
    target = ev.predict(run.teacher, held_out)
    judge = ev.Judge(run.digits)
    seconds = ev.measure_latency(
        models, ev.held_out_batch(run.test, config.latency_batch, run.seed), config.latency_rounds
    )
    layers, groups = report_layers(models["moe-l"], models["mob-s"])
    rows, tensors = {}, {}
    for name, model in models.items():
        experts = ev.SelectionCounts(list(layers), noise, config.sample_steps, Digits.text_tokens)
        blocks = ev.BlockCounts(noise.labels, config.sample_steps)
        hooks = {"moe-l": [experts], "mob-s": [blocks]}.get(name)
        accuracy, images = ev.judge_samples(model, judge, run.test, noise, config, hooks)
        counts = account(model, image_tokens=Digits.image_tokens, text_tokens=Digits.text_tokens)
        rows[name] = {
            "kind": kind_of(name),
            "total_params": counts.total_params,
            "activated_params": counts.activated_params,
            "flops": counts.flops,
            "step_seconds": seconds[name],
            "latency_ratio": seconds[name] / seconds["teacher"],
            "rel_mse": ev.relative_mse(target, ev.predict(model, held_out)),
            "class_accuracy": accuracy,
        }
        tensors[f"samples/{name}"] = images
        if name == "moe-l":
            tensors |= ckpt.pack("experts", experts.frequencies())
        if name == "mob-s":
            tensors |= ckpt.pack("blocks", blocks.frequencies())
    curves = stage_curves(run, models)
    tensors |= {f"curve/{m}/{s}": t for m, stages in curves.items() for s, t in stages.items()}
    real = judge.accuracy(run.test.images, run.test.labels)
    meta = {
        "prompts": [str(d) for d in range(Digits.num_classes)],
        "curves": {m: list(stages) for m, stages in curves.items()},
        "layers": layers,
        "groups": groups,
        "text_tokens": Digits.text_tokens,
        "notes": (
            "Activated parameters are those one token meets. FLOPs are of one image. Step: one "
            f"forward of {config.latency_batch} images, median of {config.latency_rounds}, the "
            "models taking turns. Relative MSE: ||student - teacher||² / ||teacher||² over "
            f"{config.held_out} held-out (x_t, t, prompt). Class accuracy: share of {len(noise)} "
            "samples that a classifier trained on the real digits reads as their prompt; it reads "
            f"{real:.1%} of real test digits."
        ),
    }
    return Outcome(models, rows, tensors, meta)


def report_layers(moe: nn.Module, mob: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Captions for experts.png: an image-branch layer, a single-block layer, every group."""
    from d2m_models import moe_layers
    from d2m_models.config import group_names

    names = list(moe_layers(moe))
    double = [n for n in names if n.endswith(".ff")]
    single = [n for n in names if n.startswith("single")]
    layers = {}
    if double:
        layers[double[len(double) // 2]] = (
            f"Double block {double[len(double) // 2].split('.')[1]}, image"
        )
    if single:
        layers[single[len(single) // 2]] = f"Single block {single[len(single) // 2].split('.')[1]}"
    groups = {}
    for group, blocks in group_names(mob.d2m_config).items():
        ends = [b.split(".")[1] for b in (blocks[0], blocks[-1])]
        groups[group] = f"{'D' if '.double.' in group else 'S'}{ends[0]}-{ends[1]}"
    return layers, groups


def stage_curves(run: Run, models: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Loss curves by model and stage; a mob model's and prune-depth's begin with moe-l's stages."""
    curves: dict[str, dict[str, Tensor]] = {}
    letters = {"shared": "(a) shared", "moe": "(b) MoE", "mob": "(c) MoB"}
    for name in models:
        if name == "teacher":
            continue
        stages = {"moe-l": ("shared", "moe")}.get(
            name, ("mob",) if name.startswith("mob") else ("distill",)
        )
        own = {
            letters.get(s, s): demo_page.curve_table(read_log(run.folder / name / s / "log.jsonl"))
            for s in stages
        }
        if name.startswith("mob") or name == "prune-depth":
            own = {**{k: _shift(v) for k, v in curves["moe-l"].items()}, **own}
        curves[name] = own
    return curves


def _shift(table: Tensor) -> Tensor:
    """Only the last step of a stage shared with moe-l, no values: the curve starts behind it."""
    last = table[-1:].clone()
    last[:, 1:] = float("nan")
    return last


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on: versions, processor, threads, and the back-end that runs."""
    import diffusers

    from d2m_kernels import backends
    from d2m_kernels._version import __version__

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    kind = torch.device(device).type
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "triton": triton_version,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if kind == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "backend": backends.resolve(None, kind, torch.float32),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# --- the command ----------------------------------------------------------------------------


def run_demo(
    out: Path | str,
    *,
    quick: bool = False,
    full: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Everything `d2m demo` does; returns the path of report.html."""
    out = ckpt.make_folder(out)
    config = load_config(DemoConfig, bundled("demo-quick.yaml" if quick else "demo.yaml"))
    seeds = [seed, seed + 1, seed + 2] if full else [seed]
    outcomes = {}
    for s in seeds:
        if full:
            say(f"seed {s} ({seeds.index(s) + 1} of {len(seeds)})")
        tag = ckpt.fingerprint(VERSION, to_dict(config), s, torch.device(device).type)
        run = start(config, s, device, out / "stages" / f"seed{s}-{tag}", progress)
        outcomes[s] = measure(run, train_all(run, full))
    first = outcomes[seed]
    for name in ("moe-l", "mob-s"):
        shutil.rmtree(out / "models" / name, ignore_errors=True)  # of an earlier run
        ckpt.write_folder(out / "models" / name, first.models[name].save_pretrained)
    ckpt.save_tensors(out / "report.safetensors", first.tensors, first.meta)
    demo_page.write_results(out, seed, environment(device), first.rows)
    if full:
        content = summarise(seeds, {s: o.rows for s, o in outcomes.items()})
        ckpt.write_text(out / "full.json", json.dumps(content, indent=2) + "\n")
        for claim in content["claims"]:
            say(f"{claim['claim']}: {claim['verdict']} ({claim['detail']})")
    else:
        (out / "full.json").unlink(missing_ok=True)  # an earlier run's, of other models
    page = demo_page.render(out)
    say(demo_page.text_table(first.rows))
    return page


def summarise(seeds: list[int], rows: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the paper's two claims in relative MSE."""
    names = list(rows[seeds[0]])
    summary = {
        name: {
            key: {
                "mean": mean(rows[s][name][key] for s in seeds),
                "spread": stdev(rows[s][name][key] for s in seeds),
            }
            for key in ("rel_mse", "class_accuracy", "latency_ratio")
        }
        for name in names
    }
    claims = [
        judge_claim(
            "MoE beats MLP pruning at the same activated expansion ratio",
            [rows[s]["moe-l"]["rel_mse"] for s in seeds],
            [rows[s]["prune-mlp"]["rel_mse"] for s in seeds],
        ),
        judge_claim(
            "MoB beats depth pruning at the same active depth",
            [rows[s]["mob-s"]["rel_mse"] for s in seeds],
            [rows[s]["prune-depth"]["rel_mse"] for s in seeds],
        ),
    ]
    return {
        "seeds": seeds,
        "summary": summary,
        "claims": claims,
        "runs": {str(s): rows[s] for s in seeds},
    }


def judge_claim(claim: str, ours: list[float], theirs: list[float]) -> dict[str, str]:
    """ "holds" if ours is lower by more than the spread of the paired ratios, "undecided" if within
    it.
    """
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    centre, spread = mean(ratios), stdev(ratios)
    verdict = (
        "undecided" if abs(1 - centre) <= spread else "holds" if centre < 1 else "does not hold"
    )
    detail = f"ratio of relative MSE {centre:.3f} ± {spread:.3f} over {len(ratios)} seeds"
    return {"claim": claim, "verdict": verdict, "detail": detail}
