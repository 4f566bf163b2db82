"""Made-up results of a machine, for tests of what is drawn and predicted from results."""

from __future__ import annotations

from report import roofline


def seconds(*values):
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "q1": ordered[0], "q3": ordered[-1],
            "rounds": list(values)}  # fmt: skip


def machine(peak=100.0, rate=1000.0, share=0.5):
    """Results of a machine that reaches `share` of its ceilings in every part of the work."""
    work = roofline.work("flux-dense")
    parts = {p: work[p] / (share * peak * 1e12) for p in ("attention", "ffn", "gemm")}
    parts["adaln"] = work["adaln"] / (share * rate * 1e9)
    parts["rest"] = 30 * work["rest"] * 3072 / (rate * 1e9)
    dense = sum(parts.values())
    models = {}
    for name in ("flux-dense", "flux-moe-l", "flux-moe-m", "flux-moe-s", "flux-moe-xs"):
        step = roofline.ideal(parts, work, roofline.work(name))
        ratio, flops_ratio = step / dense, roofline.work_ratio(name)
        models[name] = {
            "mode": "compile", "image_tokens": 4096, "text_tokens": 512, "step_seconds": step,
            "latency_ratio": ratio, "flops_ratio": flops_ratio,
            "latency_over_flops": ratio / flops_ratio, "latency_over_ideal": 1.0,
            "image_seconds": {"28": 28 * step, "8": 8 * step}, "backend": "triton", "run": "r",
        }  # fmt: skip
    models["flux-dense"]["parts"] = parts
    shape = {"T": 4608, "D": 3072, "S": 3072, "H": 768, "E": 12, "K": 2, "F": 12288,
             "dtype": "bfloat16", "routing": "balanced"}  # fmt: skip
    rates = {"gflop": 261.0, "gbyte": 0.2, "tflops": share * peak, "gbps": 50.0,
             "share_of_ceiling": {"tflops": share, "gbps": 0.1},
             "share_of_floor": share}  # fmt: skip
    ours = 0.261 / (share * peak)
    layer = {"id": "l", "name": "flux-4608", "shape": shape, "pass": "forward", **rates,
             "seconds": {"moe_ffn": seconds(ours), "dense": seconds(ours / 0.375)},
             "baseline": "dense", "ratio_to_dense": {"moe_ffn": 0.375, "expert loop": 0.5},
             "ratio_quartiles": {"moe_ffn": [0.37, 0.38], "expert loop": [0.5, 0.5]},
             "flop_limit": 0.375, "config": {"up": "128x256x64w8s3"}, "backend": "triton",
             "unavailable": {"megablocks": "no <module>"}, "run": "r"}  # fmt: skip
    stages = [
        {"id": s, "stage": s, "name": "flux-4608", "shape": shape, "pass": "forward", **rates,
         "seconds": {s: seconds(ours / 4), "eager": seconds(ours)}, "ratio_to": {"eager": 0.25},
         "backend": "triton", "run": "r"}
        for s in ("route", "grouped_gemm_up", "grouped_gemm_down", "combine")
    ]  # fmt: skip
    points = [{"value": v, "shape": shape, "ratio_to_dense": 0.4, "flop_limit": 0.375,
               "seconds": {"moe_ffn": seconds(ours * v), "dense": seconds(ours * v * 2)},
               "peak_bytes": {"moe_ffn": v << 20, "dense": v << 21}} for v in (1, 2)]  # fmt: skip
    env = {"device": "Model GPU", "device_type": "cuda", "date": "2026-01-01T00:00:00Z",
           "commit": "abc", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "driver": "580",
           "sm_mhz": "1980", "memory_mhz": "3201", "size": "full"}  # fmt: skip
    top = {"tflops": peak, "gbps": rate}
    return {
        "schema": "dense2moe-benchmarks/1", "environment": env,
        "runs": {"r": {**env, "ceilings": top}}, "ceilings": {**top, "run": "r"}, "stages": stages,
        "layers": [layer], "models": models, "blocks": [],
        "scaling": [{"id": a, "axis": a, "points": points, "backend": "triton", "run": "r"}
                    for a in ("tokens", "skew")],
        "distillation": [{"id": "digits/moe", "batch": 8, "samples_per_second": 10.0,
                          "config": "digits.yaml", "peak_bytes": 1 << 20, "backend": "triton",
                          "run": "r"}],
        "host": [], "skipped": [{"id": "x", "why": "no <time>", "run": "r"}],
    }  # fmt: skip


def later_run(results, peak, rate, *sections):
    """The same results after a later run, of another speed, measured some sections again."""
    top = {"tflops": peak, "gbps": rate}
    results["runs"]["s"] = {**results["environment"], "ceilings": top, "commit": "def"}
    results["ceilings"] = {**top, "run": "s"}
    for section in sections:
        for row in results[section]:
            row["run"] = "s"
    return results
