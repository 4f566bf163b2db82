"""One FLUX double and one single block at full width, dense and MoE; on a CPU also the models.

A CPU does not hold twelve billion parameters in a useful time, but a model is its blocks:

    dense = 19 double + 38 single        L = 3 dense double + 16 MoE double + 38 MoE single
    M, S, XS: one MoE block and one block router in place of each group

The embedders (0.1% of the FLOPs) are left out on both sides; L's three dense blocks count with
their full AdaLN.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from harness import flux_models
from harness.counting import peak_bytes
from harness.needs import skip_without
from harness.parts import split
from harness.race import quartiles
from report.roofline import CONFIGS, MODELS, PARTS, account_of, ideal, work

from d2m_models.mob import MixtureOfBlocks

TOKENS = {"tiny": (16, 8), "quick": (64, 64), "default": (576, 256), "full": (4096, 512)}
KINDS = ("double", "single")


def test_blocks(bench):
    image, text = TOKENS["full" if bench.device.type == "cuda" and bench.size == "default"
                         else bench.size]  # fmt: skip
    skip_without(bench.session, ["diffusers"], [f"{kind}/{image}+{text}" for kind in KINDS])
    kwargs, wide, narrow = flux_models.block_inputs(bench.size, image, text, bench.device)
    blocks, runs = {}, {}
    for kind in KINDS:
        dense, moe = flux_models.block_pair(kind, bench.size, bench.device)
        error = flux_models.error_to_reference(moe, partial(moe, temb=narrow, **kwargs))
        assert error < 0.02
        for form, block, temb in (("dense", dense, wide), ("moe", moe, narrow)):
            blocks[f"{kind} {form}"] = block
            runs[f"{kind} {form}"] = partial(block, temb=temb, **kwargs)
    dim = wide.shape[-1]
    router = MixtureOfBlocks(dim, 3).to(bench.device)
    runs["block router"] = lambda: router(
        kwargs["hidden_states"], kwargs["encoder_hidden_states"], wide,
        run=lambda place, x, c, rows: (x, c),
    )  # fmt: skip
    with torch.inference_mode():
        race = bench.race(runs, "double moe", bench.rounds(7, 3), budget=bench.seconds(6, 25))
        parts = {kind: split(runs[f"{kind} dense"], race.median(f"{kind} dense"), bench.device, dim)
                 for kind in KINDS}  # fmt: skip
        peaks = {name: peak_bytes(run, bench.device) for name, run in runs.items()}
    for kind in KINDS:
        ratio = race.ratio(f"{kind} moe", f"{kind} dense")
        names = [f"{kind} {form}" for form in ("dense", "moe")]
        bench.add(
            "blocks",
            f"{kind}/{image}+{text}",
            {
                "kind": kind,
                "image_tokens": image,
                "text_tokens": text,
                "dim": dim,
                "seconds": {n.split()[1]: v for n, v in race.to_json().items() if n in names},
                "ratio_to_dense": ratio,
                "dense_parts": parts[kind],
                "peak_bytes": {n.split()[1]: peaks[n] for n in names},
                "parameters": {n.split()[1]: sum(p.numel() for p in blocks[n].parameters())
                               for n in names},
                "backend": bench.backend(),
            },
            line=f"{kind} block, {image} + {text} tokens: {ratio:.3f} x dense "
            f"({race.median(f'{kind} moe') * 1e3:.1f} ms)",
        )  # fmt: skip
    if bench.device.type == "cpu" and bench.size != "tiny":
        compose(bench, race, parts, image, text)


def composed(name: str, times: dict[str, float]) -> float:
    """Seconds of a step from the medians of the blocks and of a block router."""
    config = CONFIGS[name]
    grouped = {"double": [], "single": []}
    if config.mob is not None:
        grouped = {"double": config.mob.double_groups, "single": config.mob.single_groups}
    total = 0.0
    for kind, count in (("double", config.num_layers), ("single", config.num_single_layers)):
        dense = len(getattr(config, f"dense_{kind}_blocks")) if config.moe else count
        inside, groups = sum(map(len, grouped[kind])), len(grouped[kind])
        active = 0 if config.mob is None else config.mob.active
        total += dense * times[f"{kind} dense"]
        total += (count - dense - inside + active * groups) * times[f"{kind} moe"]
        total += groups * times["block router"]
    return total


def compose(bench, race, parts, image: int, text: int) -> None:
    """Entries of "models" for a CPU: composed, never run as a whole.

    A ratio is composed of each round's own times, then the median taken: drift cancels.
    """
    times = {name: race.median(name) for name in race.times}
    rounds = [dict(zip(race.times, t, strict=True)) for t in zip(*race.times.values(), strict=True)]
    depth = {"double": 19, "single": 38}
    dense_parts = {p: sum(depth[k] * parts[k][p] for k in KINDS) for p in PARTS}
    dense, dense_work = composed("flux-dense", times), work("flux-dense", image, text)
    flops = account_of("flux-dense", image, text).flops
    for name in MODELS:
        ratios = [composed(name, each) / composed("flux-dense", each) for each in rounds]
        ratio = statistics.median(ratios)
        seconds = ratio * dense
        counts = account_of(name, image, text)
        best = ideal(dense_parts, dense_work, work(name, image, text))
        flops_ratio = counts.flops / flops
        record = {
            "mode": "composed",
            "image_tokens": image,
            "text_tokens": text,
            "step_seconds": seconds,
            "latency_ratio": ratio,
            "ratio_quartiles": quartiles(ratios),
            "flops": counts.flops,
            "flops_ratio": flops_ratio,
            "latency_over_flops": ratio / flops_ratio,
            "ideal_seconds": best,
            "latency_over_ideal": seconds / best,
            "total_params": counts.total_params,
            "activated_params": counts.activated_params,
        }
        if name == "flux-dense":
            record["parts"] = dense_parts
        bench.model(name, record)
