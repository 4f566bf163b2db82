#!/usr/bin/env python3
"""Times many Triton tiles for every launch of `moe_ffn`, forward and backward, and writes JSON.

    benchmarks/sweep_triton.py OUT.json [--tokens 4608] [--stages up,down,...] [--budget 240]

Each launch is caught as the library makes it and repeated with other tiles on the same tensors, so
that the kernels and their arguments are the real ones. A tile counts only if the launch leaves the
same result as the library's own choice. Compilation runs in parallel processes that share Triton's
cache. The JSON has, for every stage, the tiles by time, with registers, spills and shared memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from harness.environment import environment  # noqa: E402
from harness.race import Clock  # noqa: E402
from harness.shapes import FFNShape  # noqa: E402

from d2m_kernels import moe_ffn  # noqa: E402

SHARED_BYTES = 227 * 1024
REGISTERS = 65536
FIELDS = {
    "block_m": (64, 128, 256),
    "block_n": (64, 128, 256),
    "block_k": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "per_sm": (1, 2),
    "tma": (True, False),
    "halves": (False, True),
    "tickets": (True, False),
}


class Launch:
    """One launch of the library: kernel, stage, the library's tile, and its arguments by tile."""

    def __init__(self, kernel, stage, config, device, arguments, ticket):
        self.kernel, self.stage, self.config = kernel, stage, config
        self.device, self.arguments, self.ticket = device, arguments, ticket

    def run(self, config):
        if config.tickets:
            self.ticket.zero_()
        return self._with(config, lambda grid, **given: self.kernel[grid](**given))

    def compile(self, config):
        self._with(config, self.kernel.warmup)

    def _with(self, config, function):
        from d2m_kernels.backends.triton.launch import programs

        grid = (programs(self.device, config.per_sm),)
        ticket = self.ticket if config.tickets else None
        given = self.arguments(config) | dict(ticket_ptr=ticket) | config.meta()
        return function(grid=grid, **given)

    def tensors(self, config) -> dict[str, torch.Tensor]:
        found = {}
        for name, v in self.arguments(config).items():  # operands travel in named tuples
            members = v._asdict() if hasattr(v, "_asdict") else {"": v}
            found |= {f"{name}.{n}": x for n, x in members.items() if isinstance(x, torch.Tensor)}
        return found


def catch(shape: FFNShape, device: torch.device) -> list[Launch]:
    """Every tiled launch of one forward and backward, in order."""
    from d2m_kernels.backends.triton import launch as launching

    caught: list[Launch] = []
    real = launching.launch

    def recording(*launched):
        caught.append(Launch(*launched))
        real(*launched)

    ours = [m for n, m in sys.modules.items() if n.startswith("d2m_kernels.backends.triton")]
    modules = [m for m in ours if getattr(m, "launch", None) is real]
    for module in modules:
        module.launch = recording
    try:
        p = shape.tensors(device, grad=True)
        y = moe_ffn(**p, top_k=shape.K, shared=shape.S, backend="triton")
        y.backward(torch.randn_like(y))
    finally:
        for module in modules:
            module.launch = real
    return caught


def candidates(own, count: int) -> list:
    """The library's tile, then others, nearest first; those that cannot fit are left out."""
    others = []
    for values in itertools.product(*FIELDS.values()):
        config = dataclasses.replace(own, **dict(zip(FIELDS, values, strict=True)))
        registers = REGISTERS // (32 * config.warps * config.per_sm)  # what per_sm counts on
        config = dataclasses.replace(config, max_registers=registers if registers < 255 else None)
        shared = config.stages * (config.block_m + config.block_n) * config.block_k * 2
        accumulator = config.block_m * config.block_n // (32 * config.warps)
        if shared * config.per_sm > SHARED_BYTES or not 32 <= accumulator <= 128:
            continue
        if config.per_sm * config.warps > 16 or (config.per_sm == 2 and accumulator > 64):
            continue
        if config.halves and config.block_m < 128:
            continue
        others.append(config)

    def distance(config):
        return sum(getattr(config, f) != getattr(own, f) for f in FIELDS)

    ranked = sorted((c for c in others if c != own), key=distance)
    return [own, *ranked[: count - 1]]


def outputs(launch: Launch) -> dict[str, torch.Tensor]:
    """The tensors a launch writes, with the right values: those it repairs after being spoilt."""
    found = {}
    for name, tensor in launch.tensors(launch.config).items():
        if not tensor.is_floating_point():
            continue
        launch.run(launch.config)
        kept = tensor.clone()
        tensor.fill_(float("nan"))
        launch.run(launch.config)
        if not tensor.isnan().any():
            found[name] = kept
        tensor.copy_(kept)
    return found


def wrong(launch: Launch, config, truth: dict[str, torch.Tensor]) -> str | None:
    """What a tile's result differs in, or None."""
    tensors = launch.tensors(config)
    for name in truth:
        tensors[name].fill_(float("nan"))
    launch.run(config)
    for name, kept in truth.items():
        error = (tensors[name].float() - kept.float()).square().mean()
        if not error <= 1e-4 * kept.float().square().mean():
            return f"{name} is wrong"
    return None


def resources(launch: Launch, config) -> dict:
    compiled = launch.run(config)
    names = {"registers": "n_regs", "spills": "n_spills"}
    found = {ours: getattr(compiled, theirs, None) for ours, theirs in names.items()}
    return found | {"shared": getattr(getattr(compiled, "metadata", None), "shared", None)}


def time_one(launch: Launch, config, truth, clock: Clock) -> dict:
    row = {"name": config.name, **dataclasses.asdict(config)}
    try:
        problem = wrong(launch, config, truth)
        if problem:
            return row | {"problem": problem}
        row |= resources(launch, config)
        seconds = clock.once(lambda: launch.run(config))
        rounds = [clock.round(lambda: launch.run(config), clock.calls_for(seconds))
                  for _ in range(3)]  # fmt: skip
        return row | {"seconds": sorted(rounds)[1]}
    except Exception as error:  # noqa: BLE001 (a tile that does not work is a result)
        return row | {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


def precompile(launches, tiles: int, index: int, of: int) -> None:
    work = [(each, config) for each in launches for config in candidates(each.config, tiles)]
    for launch, config in work[index::of]:
        try:
            launch.compile(config)
        except Exception as error:  # noqa: BLE001 (the main process reports it)
            print(f"{launch.stage} {config.name}: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--stages", help="comma-separated; default: all")
    parser.add_argument("--tiles", type=int, default=24, help="tiles a stage (default: 24)")
    parser.add_argument("--budget", type=float, default=240, help="seconds for all (default: 240)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, on Triton's interpreter"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    start = time.monotonic()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if args.rehearse else "cuda")
    shape = FFNShape(T=40, D=64, S=64, H=32, E=4) if args.rehearse else FFNShape(T=args.tokens)
    import d2m_kernels.backends.triton  # noqa: F401  (its modules must be there to be patched)

    launches = catch(shape, device)
    torch.set_grad_enabled(False)
    wanted = args.stages.split(",") if args.stages else [launch.stage for launch in launches]
    launches = [launch for launch in launches if launch.stage in wanted]
    if args.worker:
        index, of = map(int, args.worker.split("/"))
        return precompile(launches, args.tiles, index, of)
    if not args.rehearse:
        command = [sys.executable, __file__, *sys.argv[1:]]
        quiet = subprocess.DEVNULL
        workers = [subprocess.Popen([*command, f"--worker={i}/{args.jobs}"], stderr=quiet)
                   for i in range(args.jobs)]  # fmt: skip
        for worker in workers:
            try:
                left = args.budget * 0.6 - (time.monotonic() - start)
                worker.wait(max(1.0, left))
            except subprocess.TimeoutExpired:
                worker.kill()
    clock = Clock(device)
    report = {"environment": environment(device), "shape": shape.to_json(), "stages": {}}
    for number, launch in enumerate(launches):
        key, rows = f"{number}:{launch.stage}", []
        truth = outputs(launch)
        for config in candidates(launch.config, args.tiles):
            if time.monotonic() - start > args.budget:
                break
            rows.append(time_one(launch, config, truth, clock))
        if not rows:
            continue
        own = next((r for r in rows if r["name"] == launch.config.name), rows[0])
        rows.sort(key=lambda r: r.get("seconds", float("inf")))
        report["stages"][key] = {"own": launch.config.name, "own_seconds": own.get("seconds"),
                                 "checked": sorted(truth), "tiles": rows}  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        if "seconds" in rows[0] and own.get("seconds"):
            best, speedup = rows[0], own["seconds"] / rows[0]["seconds"]
            print(f"{key:<16} {launch.config.name} {own['seconds'] * 1e6:.1f} us; best "
                  f"{best['name']} {best['seconds'] * 1e6:.1f} us ({speedup:.2f} x), "
                  f"{len(rows)} tiles", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
