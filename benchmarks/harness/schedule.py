"""How evenly a launch's tiles keep a GPU busy: the Triton kernels' schedule, simulated.

    python benchmarks/harness/schedule.py

prints, for FLUX.1-MoE-L's layer and random top-2 routing, what share of the multiprocessors' time
each launch uses: as the kernels share their tiles out (tickets), and in rounds of the grid.

The model of a tile's time: each step of its sum waits for its operands out of L2, 38.8 bytes a
cycle and multiprocessor, or for the tensor cores, 4096 bf16 FLOPs a cycle; then come an epilogue
of 4000 cycles for 128 x 256 numbers and 700 cycles for a ticket. Programs that share a
multiprocessor share both rates.
"""

from __future__ import annotations

import functools
import heapq
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from d2m_kernels.backends.triton import configs  # noqa: E402

D, SHARED, H, EXPERTS, TOP_K = 3072, 3072, 768, 12, 2
GPUS = {"H100": (132, "sm90"), "A100": (108, "sm80"), "H20": (78, "sm90")}
TOKENS = ((1536,), (4608,), (4096, 512))
STAGES = ("up", "down", "down_combine", "act_bwd", "dx", "dx_combine", "wgrad")
HALVED = ("up", "down", "dx")  # the kernel that knows half tiles


class Tile(NamedTuple):
    group: int  # -1: the shared expert
    row: int  # within its group
    col: int
    half: bool


def tiles_of(rows, shared, config, halves: bool) -> list[Tile]:
    """Every tile of a launch in the order of its number, as pieces.py counts them.

    `rows`: (rows, width) of each expert; `shared`: those of the shared one, or None. Whole tiles
    of all groups come first, then the half ones.
    """
    M, N, G = config.block_m, config.block_n, config.group_m
    whole, half = [], []
    groups = [(-1, *shared)] if shared else []
    for group, count, width in groups + [(e, *r) for e, r in enumerate(rows)]:
        full, rest = divmod(count, M)
        last = halves and 0 < rest <= M // 2
        tiles_m, tiles_n = full + (rest > 0) - last, -(-width // N)
        for strip in range(0, tiles_m, G):
            inside = range(strip, min(strip + G, tiles_m))
            whole += [Tile(group, m * M, n * N, False) for n in range(tiles_n) for m in inside]
        if last:
            half += [Tile(group, full * M, n * N, True) for n in range(tiles_n)]
    return whole + half


def cycles(config, steps: int, half: bool = False) -> float:
    """A tile's time on a multiprocessor; `steps` of block_k each."""
    M, N, K = config.block_m // (1 + half), config.block_n, config.block_k
    step = max(2 * (M + N) * K / 38.8, 2 * M * N * K / 4096) * config.per_sm
    return steps * step + 4000 * M * N / (128 * 256) + 700


def finish(costs: list[float], programs: int, tickets: bool) -> float:
    """When the last program is done: in rounds, or each tile to the first that is free."""
    if not tickets:
        return max(sum(costs[i::programs]) for i in range(programs))
    free = [0.0] * programs
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@functools.cache
def routing(tokens: int, seed: int) -> list[int]:
    """Rows of each expert."""
    draw, counts = random.Random(seed), [0] * EXPERTS
    for _ in range(tokens):
        for e in draw.sample(range(EXPERTS), TOP_K):
            counts[e] += 1
    return counts


def launch(stage: str, streams: tuple[int, ...], arch: str, seed: int = 0):
    """The config of a launch and the cost of each of its tiles, for streams of so many tokens."""
    most, costs = max(streams), []
    end, sides = stage.endswith("combine"), stage in ("up", "act_bwd")
    rows = most if end or sides else SHARED if stage == "wgrad" else most * TOP_K / EXPERTS
    width = SHARED if sides else D
    config = configs.from_table(arch, stage, rows, width)
    for number, tokens in enumerate(sorted(streams) if stage in HALVED else streams):
        counts = routing(tokens, seed + 100 * number)
        if stage == "wgrad":
            across = -(-D // config.block_n)
            for neurons, depth in [(SHARED, tokens)] + [(H, n) for n in counts]:
                cost = cycles(config, -(-depth // config.block_k))
                costs += [cost] * (-(-neurons // config.block_m) * across)
            continue
        steps = (H if stage in ("down", "dx") else D) // config.block_k
        experts = [] if end else [(n, H if sides else D) for n in counts]
        shared = (tokens, SHARED if sides else D) if end or sides else None
        halves = config.halves and stage in HALVED
        for tile in tiles_of(experts, shared, config, halves):
            costs.append(cycles(config, steps, tile.half))
    return config, costs


def utilisation(stage, streams, gpu: str, tickets: bool | None = None, seeds: int = 5) -> float:
    """The mean over `seeds` routings; `tickets` None: as the table has it."""
    sms, arch = GPUS[gpu]
    shares = []
    for seed in range(seeds):
        config, costs = launch(stage, streams, arch, seed)
        programs = sms * config.per_sm
        drawn = config.tickets if tickets is None else tickets
        shares.append(sum(costs) / (programs * finish(costs, programs, drawn)))
    return sum(shares) / seeds


def main() -> None:
    head = [f"{'+'.join(map(str, t))} {gpu}" for t in TOKENS for gpu in GPUS]
    print(f"| launch | {' | '.join(head)} |\n{'|---' * (1 + len(head))}|")
    for stage in STAGES:
        cells = [f"{utilisation(stage, t, g, False):.2f} → {utilisation(stage, t, g):.2f}"
                 for t in TOKENS for g in GPUS]  # fmt: skip
        print(f"| `{stage}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
