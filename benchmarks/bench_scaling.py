"""How time and memory of `moe_ffn` grow with tokens, experts, top-k, expert width, batch and skew.

One thing varies at a time, from FLUX's layer (1S12E2A, D = 3072) at a few hundred tokens; batch is
DiT-XL/2's, 256 tokens a sample. Dense is the FFN with all of the same neurons.
"""

from __future__ import annotations

import pytest
import torch
from harness import peers
from harness.counting import peak_bytes
from harness.shapes import FFNShape, dit_xl, flux

from d2m_kernels import moe_ffn

# axis: (values on a CPU, values on a GPU; --full on a CPU takes the latter up to 4608 tokens)
AXES = {
    "tokens": ((256, 512, 1024), (256, 512, 1024, 2048, 4608, 9216, 18432)),
    "experts": ((6, 12, 24), (4, 6, 12, 24, 48)),
    "top_k": ((1, 2, 4), (1, 2, 3, 4, 6, 12)),
    "expert_width": ((384, 768, 1536), (192, 384, 768, 1536, 3072)),
    "batch": ((1, 4, 16), (1, 2, 4, 8, 16, 32, 64)),
    "skew": ((0.0, 1.0, 2.0), (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)),
}


def shape_at(axis: str, value, size: str, on_gpu: bool) -> FFNShape:
    base = flux(size, 4608).at(T=4608 if on_gpu else 512)
    if size in ("tiny", "quick"):
        base = flux(size)
    if axis == "tokens":
        return base.at(T=value if size not in ("tiny", "quick") else value // 16)
    if axis == "batch":
        sample = dit_xl("default", 1) if size not in ("tiny", "quick") else dit_xl("tiny")
        return sample.at(T=sample.T * value)
    if axis == "skew":
        return base.at(routing="balanced" if value == 0 else f"zipf:{value:g}")
    if axis == "expert_width":
        return base.at(H=max(1, base.H * value // 768))
    return base.at(**{{"experts": "E", "top_k": "K"}[axis]: value})


@pytest.mark.parametrize("axis", AXES)
def test_scaling(bench, axis):
    on_gpu = bench.device.type == "cuda"
    if bench.size == "quick" and axis not in ("tokens", "skew"):
        pytest.skip("not in the quick set")
    if bench.size == "default" and not on_gpu and axis == "expert_width":
        pytest.skip("not in the default set on a CPU")
    wide = bench.size == "full" or (on_gpu and bench.size == "default")
    points = []
    with torch.inference_mode():
        for value in AXES[axis][wide]:
            shape = shape_at(axis, value, bench.size, on_gpu)
            if shape.T > 4608 and not on_gpu:
                continue
            p = shape.tensors(bench.device)

            def ours(p=p, shape=shape):
                return moe_ffn(**p, top_k=shape.K, shared=shape.S)

            assert peers.rms_error(ours(), peers.expert_loop(p, shape)) < 0.02
            runs = {"moe_ffn": ours, "dense": lambda p=p, shape=shape: peers.dense(p, shape)}
            race = bench.race(runs, None, bench.rounds(5, 3), budget=bench.seconds(2, 6))
            gbyte = shape.gbyte(2 * shape.D * shape.F, 2 * shape.T * shape.D)
            points.append({
                "value": value,
                "shape": shape.to_json(),
                "seconds": race.to_json(),
                "ratio_to_dense": race.ratio("moe_ffn", "dense"),
                "flop_limit": shape.activated / shape.F,
                "peak_bytes": {n: peak_bytes(run, bench.device) for n, run in runs.items()},
                **bench.against_ceilings(race.median("moe_ffn"), shape.gflop(shape.activated),
                                         gbyte),
            })  # fmt: skip
            del p
    bench.show(race, "moe_ffn")
    bench.add("scaling", axis, {"axis": axis, "points": points, "backend": bench.backend()})
    text = ", ".join(f"{p['value']:g}: {p['seconds']['moe_ffn']['median'] * 1e3:.2f} ms "
                     f"({p['ratio_to_dense']:.2f} x dense)" for p in points)  # fmt: skip
    bench.note(f"scaling with {axis}: {text}")
