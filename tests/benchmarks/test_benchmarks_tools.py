"""What the benchmarks are made of: timing, forced routing, counts, composed and whole models."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

from harness import (
    counting,
    peers,
    race,
    results,
    shapes,
)

CPU = torch.device("cpu")
GPU_WHEELS = ROOT / "benchmarks" / "gpu-wheels.txt"


# --- timing ---------------------------------------------------------------------------------


def test_race_takes_turns_and_tells_fast_from_slow():
    calls = []

    def contender(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    got = race.race({"a": contender("a", 0.001), "b": contender("b", 0.05)}, 4, CPU)
    assert calls == ["a", "b"] * 5  # one to warm up
    assert [len(t) for t in got.times.values()] == [4, 4]
    assert got.median("b") >= 0.05 and got.ratio("b", "a") > 1.5
    low, high = got.spread("b", "a")
    assert low <= got.ratio("b", "a") <= high


def test_a_ratio_is_taken_within_rounds():
    """A machine that halves its speed for one round leaves the ratio as it is."""
    got = race.Race({"x": [1.0, 2.0, 1.0], "y": [2.0, 4.0, 2.0]})
    assert got.ratios("x", "y") == [0.5, 0.5, 0.5]
    assert got.to_json()["x"] == {"median": 1.0, "q1": 1.0, "q3": 2.0, "rounds": [1.0, 2.0, 1.0]}


def test_race_stops_at_its_budget_but_not_before_three_rounds():
    got = race.race({"a": lambda: time.sleep(0.01)}, 50, CPU, budget=0.0)
    assert len(got.times["a"]) == 3


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["balanced", "zipf", "zipf:2"])
@pytest.mark.parametrize("sizes", [{}, {"E": 7, "K": 3, "H": 16}, {"K": 1}])
def test_routing_is_forced(routing, sizes):
    """Whoever takes the top-k of the logits, in fp32 or bf16, finds the experts meant."""
    shape = shapes.FFNShape(**{"T": 700, "D": 96, "S": 96, "H": 24, **sizes}, routing=routing)
    p, ids = shape.tensors(CPU), shape.choices(CPU)
    assert ids.shape == (700, shape.K)
    assert all(len(set(row)) == shape.K for row in ids.tolist())
    wanted = ids.sort(1).values
    for x, router in ((p["x"].float(), p["router"]), (p["x"], p["router"].bfloat16())):
        got = (x @ router.T).topk(shape.K).indices.sort(1).values
        assert torch.equal(got, wanted)
    counts = torch.bincount(ids.reshape(-1), minlength=shape.E)
    if routing == "balanced":
        assert counts.max() - counts.min() <= 1
    else:
        assert counts[0] > 1.3 * counts[-1]


def test_quick_shapes_keep_the_ratio_of_flops():
    for name in shapes.NAMES:
        full, quick = shapes.named(name, "full"), shapes.named(name, "quick")
        assert full.activated / full.F == pytest.approx(0.375)
        assert quick.activated / quick.F == pytest.approx(0.375)


def test_plain_peers_compute_the_same_layer():
    shape = shapes.FFNShape(T=50, D=96, S=96, H=24, dtype=torch.float32)
    p = shape.tensors(CPU)
    from d2m_kernels import moe_ffn

    ours = moe_ffn(p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], top_k=2, shared=96)
    for peer in (peers.expert_loop, peers.grouped_mm):
        torch.testing.assert_close(peer(p, shape), ours, rtol=1e-4, atol=1e-5)


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    import bench_moe_ffn

    shape = shapes.FFNShape(T=50, D=96, S=96, H=24)
    p = shape.tensors(CPU)
    truth = {"bias": peers.expert_loop(p, shape).float()}
    right = peers.Contender(lambda: peers.grouped_mm(p, shape))
    wrong = peers.Contender(lambda: 1.1 * peers.grouped_mm(p, shape))
    broken = peers.Contender(lambda: 1 / 0)
    assert bench_moe_ffn.check(right, truth) is None
    assert "off by" in bench_moe_ffn.check(wrong, truth)
    assert "ZeroDivisionError" in bench_moe_ffn.check(broken, truth)


# --- counts ---------------------------------------------------------------------------------


def test_peak_bytes_of_a_call():
    x = torch.randn(1000)

    def call():
        y = x + 1  # 4000 bytes
        z = y + 1  # 8000 now
        del y
        return z + 1  # 8000 again

    peak = counting.peak_bytes(call, CPU)
    assert 8000 <= peak < 10000


def test_host_syncs_are_counted():
    x = torch.randn(10)
    quiet = counting.launches_and_syncs(lambda: x.sum() + 1, CPU)
    loud = counting.launches_and_syncs(lambda: x.sum().item() + x.nonzero().sum(), CPU)
    assert quiet == {"operators": 2, "host_syncs": 0}
    assert loud["host_syncs"] == 2


def test_saved_bytes_are_what_the_backward_needs():
    """x and the weight are there anyway; silu keeps its input, the second product its own."""
    x, w = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    kept = counting.saved_bytes(lambda: torch.nn.functional.silu(x @ w) @ w, [x, w])
    assert kept == 2 * 400


def test_moe_ffn_saves_preactivations_and_routing_only():
    shape = shapes.FFNShape(T=50, D=96, S=96, H=24)
    p = shape.tensors(CPU, grad=True)
    from d2m_kernels import moe_ffn

    def forward():
        return moe_ffn(p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], top_k=2, shared=96)

    kept = counting.saved_bytes(forward, list(p.values()))
    preactivations = 2 * 50 * (96 + 2 * 24)
    routing = 4 * (50 * (12 + 4 * 2) + 13)
    assert preactivations <= kept <= preactivations + routing


def test_parts_of_a_dense_block():
    """An FFN beside an attention projection: each product is found by its shape."""
    from harness.parts import split

    D, T = 128, 1024
    x, w = torch.randn(T, D), torch.randn(4 * D, D)
    up, down, square = w, w.T.contiguous(), torch.randn(D, D)
    fused, mod = torch.randn(D, 5 * D), torch.randn(6 * D, D)

    def step():
        h = torch.nn.functional.gelu(x @ up.T)
        y = h @ down.T + x @ square.T
        return torch.cat([y, h], 1) @ fused.T + (x[:1] @ mod.T)[:, :D]

    shares = []
    for _ in range(5):
        got = split(step, 2.0, CPU, D)
        assert set(got) == {"attention", "ffn", "gemm", "adaln", "rest"}
        assert sum(got.values()) == pytest.approx(2.0)
        assert got["attention"] == 0 and got["adaln"] > 0 and got["gemm"] > 0
        shares.append(got["ffn"] / got["gemm"])
    assert sorted(shares)[2] > 2  # 2 x 4 D^2 + 0.8 of 5 D^2 against D^2 + 0.2 of 5 D^2


def test_models_are_composed_from_their_blocks():
    """Blocks that run, by kind: dense, MoE, and one MoE block and one router for each group."""
    pytest.importorskip("diffusers")
    from bench_blocks import composed

    units = {"double dense": 1, "double moe": 100, "single dense": 1e4, "single moe": 1e6,
             "block router": 1e8}  # fmt: skip
    for name, (dense, double, wide, single, groups) in {
        "flux-dense": (19, 0, 38, 0, 0),
        "flux-lite": (8, 0, 38, 0, 0),
        "flux-moe-l": (3, 16, 0, 38, 0),
        "flux-moe-m": (3, 1 + 5, 0, 38, 5),
        "flux-moe-s": (3, 1 + 5, 0, 23 + 3, 8),
        "flux-moe-xs": (3, 1 + 5, 0, 13 + 5, 10),
    }.items():
        want = dense + 100 * double + 1e4 * wide + 1e6 * single + 1e8 * groups
        assert composed(name, units) == want, name


def test_extra_memory_of_the_cpu_backend():
    """Beyond the result: at most the routed rows and hidden units, and the shared activation."""
    from d2m_kernels import backends, moe_ffn

    if backends.resolve(None, "cpu", torch.float32) != "cpu":
        pytest.skip("the compiled back-end is not there")
    shape = shapes.FFNShape(T=4608, D=128, S=128, H=32, dtype=torch.float32)
    p = shape.tensors("cpu")
    with torch.inference_mode():

        def call():
            return moe_ffn(p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], top_k=shape.K,
                           shared=shape.S)  # fmt: skip

        extra = counting.peak_bytes(call, CPU) - p["x"].nbytes
    routed, activation = shape.T * shape.K * (shape.D + shape.H), shape.T * shape.S
    assert 0 < extra <= 1.1 * 4 * (routed + activation)


# --- whole models ---------------------------------------------------------------------------


def tiny_models(*names):
    pytest.importorskip("diffusers")
    from harness.flux_models import Model

    session = types.SimpleNamespace(size="tiny", device=CPU, attention=None)
    return [Model(name, session) for name in names]


def recorder():
    """As much of the `bench` fixture as whole models use."""
    kept = results.Results(None, {"date": "1", "commit": "a"})
    return types.SimpleNamespace(
        device=CPU, size="tiny", results=kept, rounds=lambda *_: 1,
        session=types.SimpleNamespace(attention=None),
        race=lambda runs, ours, rounds, budget: race.race(runs, rounds, CPU, budget),
        model=lambda name, record: kept.set("models", name, record),
        backend=lambda: "torch",
    )  # fmt: skip


def pretend_graph(model):
    """What a CUDA graph does, without one: the step into the same velocity each time."""
    if getattr(getattr(model.model, "d2m_config", None), "mob", None) is not None:
        raise RuntimeError("read on the host")
    model.velocity, model.graph_bytes = model.step()[0].clone(), 1000
    return lambda: model.velocity.copy_(model.step()[0])


def test_replayed_steps_are_the_same_image():
    (model,) = tiny_models("flux-dense")
    from harness import flux_models

    before = {k: v.clone() for k, v in model.kwargs.items() if isinstance(v, torch.Tensor)}
    with torch.inference_mode():
        want = flux_models.denoise(model.model, model.kwargs, 3)
        got = flux_models.denoise_replayed(model.kwargs, pretend_graph(model), model.velocity, 3)
    assert torch.equal(got, want) and not torch.equal(want, before["hidden_states"])
    assert all(torch.equal(model.kwargs[k], v) for k, v in before.items())


def test_graphs_fall_back_to_eager_code_where_compile_fails(monkeypatch):
    """Whatever fails, the other modes are measured in full, and what had been measured stays."""
    dense, student, grouped = tiny_models("flux-dense", "flux-moe-l", "flux-moe-s")
    import bench_flux
    from harness import flux_models

    def broken(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(flux_models.Model, "compile", broken)
    monkeypatch.setattr(flux_models.Model, "graph", pretend_graph)
    monkeypatch.setattr(bench_flux, "STEPS", (2, 1))
    bench = recorder()
    assert len(bench_flux.run_modes(bench, dense, student)) == 2
    kept = bench.results.content["models"]
    for name in ("flux-dense", "flux-moe-l"):
        modes, ours = kept[name]["modes"], name == "flux-moe-l"
        for mode in ("eager", "graphs"):
            entry = modes[mode]
            assert set(entry["image_seconds"]) == {"2", "1"} and entry["step_seconds"] > 0
            assert not ours or entry["latency_over_ideal"] > 0 and entry["ratio_rounds"]
        assert modes["graphs"]["captured"] == "eager"
        assert modes["graphs"]["peak_bytes"] == kept[name]["model_bytes"] + 1000
        assert kept[name]["mode"] == "eager" and ours != ("parts" in modes["eager"])
    assert kept["flux-moe-l"]["modes"]["compile"] == {"unavailable": "RuntimeError: no compiler"}

    # blocks chosen on the host: no graph; and an image that fails leaves the step
    monkeypatch.setattr(flux_models.Model, "image_seconds", lambda *_: 1 / 0)
    assert len(bench_flux.run_modes(bench, dense, grouped)) == 1
    modes = bench.results.content["models"]["flux-moe-s"]["modes"]
    assert modes["graphs"] == {"unavailable": "RuntimeError: read on the host"}
    assert modes["eager"]["latency_ratio"] > 0 and "ZeroDivision" in modes["eager"]["incomplete"]
    assert modes["eager"]["latency_over_ideal"] > 0 and "peak_bytes" not in modes["eager"]
