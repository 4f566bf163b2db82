#!/usr/bin/env python3
"""The first minutes of the Triton kernels on a GPU: are they right, and which pins are fast.

    benchmarks/first_run.py OUT.json [--budget 180]

Each stage of the layer, at 4608 tokens, runs in a process of its own that may take 40 s: its error
beside torch's (fp32 is the truth), 20 runs that must agree to the bit, and its time. One that fails
is tried again with the small tile, then with the ptxas that $D2M_PTXAS names. Then pins that bring
back what changed last race against the table of tiles, interleaved, forward and backward.
"""

from __future__ import annotations

import argparse
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
from harness.race import Clock, race  # noqa: E402
from harness.shapes import FFNShape  # noqa: E402

from d2m_kernels import Stream, moe_ffn, moe_ffn_pair, route  # noqa: E402

STAGES = ("route", "forward", "backward", "pair")
LIMIT, REPEATS = 40, 20
WIDE, NARROW = "128x256x64w8s3p1", "128x128x64w8s3p2r128"
PINS = {
    "table": "",
    "rounds": f"up={WIDE}halftmastatic,down={WIDE}halftmastatic,dx={WIDE}halftmastatic,"
    f"wgrad={WIDE}static,act_bwd=128x128x64w8s4p1tmastatic",
    "no fence": f"up={WIDE}halftmanofence,down={WIDE}halftmanofence,wgrad={WIDE}nofence",
    "narrow down": f"down={NARROW}halftma,down_combine={NARROW}tmastatic,dx={NARROW}halftma,"
    f"dx_combine={NARROW}tmastatic",
    "exact tanh": f"up={WIDE}halftmaexact",
    "shared rows by TMA": f"up={WIDE}halftmaatma",
    "whole tiles": f"up={WIDE}tma,down={WIDE}tma,dx={WIDE}tma",
}


def calls(shape: FFNShape, device):
    """{stage: a function of (back-end, dtype) that returns its results}."""
    p = shape.tensors(device)
    dy = torch.randn(p["x"].shape, device=device, dtype=p["x"].dtype)

    def cast(dtype, grad=False):
        # not the router: other experts might be chosen
        q = {n: t if n == "router" else t.to(dtype) for n, t in p.items()}
        return {n: t.detach().clone().requires_grad_(grad) for n, t in q.items()}

    def layer(backend, dtype, grad=False):
        q = cast(dtype, grad)
        y = moe_ffn(**q, top_k=shape.K, shared=shape.S, backend=backend)
        if not grad:
            return [y]
        y.backward(dy.to(dtype))
        return [t.grad for t in q.values()]

    def routed(backend, dtype):
        return [route(p["x"].to(dtype), p["router"].to(dtype), top_k=shape.K,
                      backend=backend).probs]  # fmt: skip

    def pair(backend, dtype):
        q = cast(dtype)
        x = q.pop("x")
        few = max(1, shape.T // 9)
        streams = [Stream(t, **q, top_k=shape.K, shared=shape.S) for t in (x[few:], x[:few])]
        return list(moe_ffn_pair(*streams, backend=backend))

    return {"route": routed, "forward": layer, "pair": pair,
            "backward": lambda backend, dtype: layer(backend, dtype, True)}  # fmt: skip


def stage_alone(name: str, shape: FFNShape, device) -> dict:
    """What a process of its own finds out about a stage."""
    function, dtype = calls(shape, device)[name], shape.dtype
    exact = function("reference", torch.float32)
    ours, own = function("triton", dtype), function("reference", dtype)

    def error(results):
        return max(((r.float() - e).square().mean() / e.square().mean()).sqrt().item()
                   for r, e in zip(results, exact, strict=True))  # fmt: skip

    same = all(
        torch.equal(a, b) for _ in range(REPEATS if device.type == "cuda" else 1)
        for a, b in zip(ours, function("triton", dtype), strict=True)
    )  # fmt: skip
    clock = Clock(device)
    seconds = clock.once(lambda: function("triton", dtype))
    seconds = clock.round(lambda: function("triton", dtype), clock.calls_for(seconds))
    found = {"error": error(ours), "torch_error": error(own), "same_bits": same}
    right = same and found["error"] <= 2 * found["torch_error"] + 1e-5
    return found | {"seconds": seconds, "right": right}


def in_a_process(name: str, rehearse: bool, limit: float) -> list[dict]:
    """The attempts at a stage, the last of which succeeded if any did."""
    retries = [{}, {"D2M_TRITON_CONFIG": "small"}]
    if "D2M_PTXAS" in os.environ:
        retries.append({"TRITON_PTXAS_PATH": os.environ["D2M_PTXAS"]})
    command = [sys.executable, __file__, "-", "--stage", name, *["--rehearse"] * rehearse]
    attempts = []
    for extra in retries:
        found = {"with": extra}
        try:
            done = subprocess.run(command, env=os.environ | extra, capture_output=True, text=True,
                                  timeout=limit)  # fmt: skip
            found |= (
                json.loads(done.stdout.splitlines()[-1])
                if done.returncode == 0
                else {"problem": done.stderr[-600:]}
            )
        except subprocess.TimeoutExpired:
            found["problem"] = f"longer than {limit:.0f} s"
        attempts.append(found)
        if found.get("right"):
            break
    return attempts


def pins_raced(shape: FFNShape, device, seconds: float) -> dict:
    """{pass: {pin: [median seconds, ratio to the table's tiles]}}."""
    functions, report = calls(shape, device), {}
    for passed in ("forward", "backward"):

        def pinned(spec, function=functions[passed]):
            os.environ["D2M_TRITON_CONFIG"] = spec
            return function("triton", shape.dtype)

        contenders = {name: lambda s=spec, f=pinned: f(s) for name, spec in PINS.items()}
        rounds = 10 if device.type == "cuda" else 1
        raced = race(contenders, rounds, device, budget=seconds / 2)
        report[passed] = {n: [raced.median(n), raced.ratio(n, "table")] for n in contenders}
        os.environ.pop("D2M_TRITON_CONFIG")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--budget", type=float, default=180, help="seconds for all (default: 180)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, interpreted")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    start = time.monotonic()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if args.rehearse else "cuda")
    shape = FFNShape(T=36, D=64, S=64, H=32, E=4) if args.rehearse else FFNShape(T=4608)
    if args.stage:
        print(json.dumps(stage_alone(args.stage, shape, device)))
        return
    report = {"environment": environment(device), "shape": shape.to_json(), "stages": {}}
    for name in STAGES:
        attempts = in_a_process(name, args.rehearse, max(LIMIT, args.budget / 6))
        report["stages"][name] = attempts
        last = attempts[-1]
        verdict = "right" if last.get("right") else last.get("problem", "wrong")
        us, error, own = (last.get(k, 0.0) for k in ("seconds", "error", "torch_error"))
        print(f"{name:<9} {us * 1e6:9.1f} us  error {error:.2e} (torch {own:.2e})  "
              f"{last['with'] or ''} {verdict}", flush=True)  # fmt: skip
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    left = args.budget - (time.monotonic() - start)
    report["pins"] = pins_raced(shape, device, max(10.0, left))
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for passed, pins in report["pins"].items():
        for name, (seconds, ratio) in pins.items():
            print(f"{passed:<9} {name:<20} {seconds * 1e6:9.1f} us  {ratio:.3f} x the table's")
    if not all(a[-1].get("right") for a in report["stages"].values()):
        sys.exit("not every stage is right: see above, and " + str(args.out))


if __name__ == "__main__":
    main()
