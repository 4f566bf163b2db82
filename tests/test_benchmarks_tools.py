"""What the benchmarks are made of: timing, forced routing, counts, files, compare.py, gpu.sh."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # its modules are no package

import compare  # noqa: E402
import counting  # noqa: E402
import environment as env  # noqa: E402
import peers  # noqa: E402
import race  # noqa: E402
import results  # noqa: E402
import shapes  # noqa: E402

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
    from parts import split

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


# --- whole models ---------------------------------------------------------------------------


def tiny_models(*names):
    pytest.importorskip("diffusers")
    from flux_model import Model

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
        model_line=lambda name, record: None,
    )  # fmt: skip


def pretend_graph(model):
    """What a CUDA graph does, without one: the step into the same velocity each time."""
    if getattr(getattr(model.model, "d2m_config", None), "mob", None) is not None:
        raise RuntimeError("read on the host")
    model.velocity, model.graph_bytes = model.step()[0].clone(), 1000
    return lambda: model.velocity.copy_(model.step()[0])


def test_replayed_steps_are_the_same_image():
    (model,) = tiny_models("flux-dense")
    import flux

    before = {k: v.clone() for k, v in model.kwargs.items() if isinstance(v, torch.Tensor)}
    with torch.inference_mode():
        want = flux.denoise(model.model, model.kwargs, 3)
        got = flux.denoise_replayed(model.kwargs, pretend_graph(model), model.velocity, 3)
    assert torch.equal(got, want) and not torch.equal(want, before["hidden_states"])
    assert all(torch.equal(model.kwargs[k], v) for k, v in before.items())


def test_graphs_fall_back_to_eager_code_where_compile_fails(monkeypatch):
    """Whatever fails, the other modes are measured in full, and what had been measured stays."""
    dense, student, grouped = tiny_models("flux-dense", "flux-moe-l", "flux-moe-s")
    import bench_flux
    import flux_model

    def broken(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(flux_model.Model, "compile", broken)
    monkeypatch.setattr(flux_model.Model, "graph", pretend_graph)
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
    monkeypatch.setattr(flux_model.Model, "image_seconds", lambda *_: 1 / 0)
    assert len(bench_flux.run_modes(bench, dense, grouped)) == 1
    modes = bench.results.content["models"]["flux-moe-s"]["modes"]
    assert modes["graphs"] == {"unavailable": "RuntimeError: read on the host"}
    assert modes["eager"]["latency_ratio"] > 0 and "ZeroDivision" in modes["eager"]["incomplete"]
    assert modes["eager"]["latency_over_ideal"] > 0 and "peak_bytes" not in modes["eager"]


# --- results files --------------------------------------------------------------------------


def test_results_are_kept_renewed_and_merged(tmp_path):
    path = tmp_path / "out" / "cpu.json"
    first = results.Results(path, {"date": "1", "commit": "a"})
    first.add("skipped", "route/x", {"why": "deadline"})
    first.add("stages", "permute/x", {"v": 1})
    first.set("models", "flux-moe-l", {"v": 1})
    second = results.Results(path, {"date": "2", "commit": "b"})
    second.add("stages", "permute/x", {"v": 2})
    second.add("stages", "route/x", {"v": 3})
    content = results.load(path)
    assert [(row["id"], row["v"]) for row in content["stages"]] == [
        ("permute/x", 2),
        ("route/x", 3),
    ]
    assert content["skipped"] == []  # measured after all
    assert set(content["runs"]) == {"1 a", "2 b"}  # the model is still of the first run
    second.set("models", "flux-moe-l", {"v": 2})
    assert set(results.load(path)["runs"]) == {"2 b"}
    path.write_text('{"schema": "something/2"}')
    with pytest.raises(ValueError, match="something/2"):
        results.Results(path, {"date": "3", "commit": "c"})


def test_ceilings_belong_to_their_run(tmp_path):
    """A second run's ceilings leave those alone by which the first run's shares were taken."""
    path = tmp_path / "cpu.json"
    first = results.Results(path, {"date": "1", "commit": "a"})
    first.set_ceilings({"tflops": 1.0, "gbps": 10.0})
    first.add("stages", "route/x", {"v": 1})
    second = results.Results(path, {"date": "2", "commit": "b"})
    second.set_ceilings({"tflops": 2.0, "gbps": 20.0})
    second.add("stages", "permute/x", {"v": 1})
    content = results.load(path)
    tops = [content["runs"][row["run"]]["ceilings"]["tflops"] for row in content["stages"]]
    assert tops == [1.0, 2.0]
    assert content["ceilings"] == {"tflops": 2.0, "gbps": 20.0, "run": "2 b"}
    assert "ceilings" not in content["environment"]


def test_environment_and_file_name(monkeypatch):
    monkeypatch.setenv("D2M_COMMIT", "0123")
    record = env.environment(CPU)
    assert record["commit"] == "0123" and record["torch"] == torch.__version__
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 PCIe": "h100",
             "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA H20": "h20"}  # fmt: skip
    for name, slug in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert env.slug(torch.device("cuda")) == slug
    assert env.slug(CPU) == "cpu"


# --- compare --------------------------------------------------------------------------------


def results_file(path, ours, dense=(1.0, 1.1, 1.0, 1.05, 1.0)):
    content = results.empty()
    rows = {"moe_ffn": race.summary(list(ours)), "dense": race.summary(list(dense))}
    content["layers"].append({"id": "l", "seconds": rows})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


BASE = (0.40, 0.44, 0.40, 0.42, 0.40)  # 0.4 of dense in every round


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.01, "same"), (1.10, "slower"), (0.9, "faster")]
)
def test_compare_tells_changes_from_noise(tmp_path, factor, verdict):
    old = compare.collect(results_file(tmp_path / "a.json", BASE))
    new = compare.collect(results_file(tmp_path / "b.json", [t * factor for t in BASE]))
    lines, slower = compare.compare(old, new, 0.02)
    assert slower == (verdict == "slower")
    assert (verdict == "same") == (len(lines) == 1)
    assert verdict == "same" or lines[0].startswith(verdict)


def test_compare_ignores_a_machine_that_slowed_down(tmp_path):
    """Both contenders took half as long again: the ratio within rounds did not move."""
    old = compare.collect(results_file(tmp_path / "a.json", BASE))
    slow = [t * 1.5 for t in BASE]
    dense = [1.5, 1.65, 1.5, 1.575, 1.5]
    new = compare.collect(results_file(tmp_path / "b.json", slow, dense))
    assert compare.compare(old, new, 0.02)[1] == 0


def test_compare_does_not_judge_two_rounds(tmp_path):
    old = compare.collect(results_file(tmp_path / "a.json", BASE[:2], (1.0, 1.1)))
    new = compare.collect(results_file(tmp_path / "b.json", (0.8, 0.9), (1.0, 1.1)))
    lines, slower = compare.compare(old, new, 0.02)
    assert slower == 0 and "too few rounds" in lines[-1]


def test_compare_joins_the_runs_of_a_folder(tmp_path):
    for i in range(3):
        results_file(tmp_path / "runs" / f"{i}.json", BASE)
    (rounds,) = compare.collect(tmp_path / "runs").values()
    assert len(rounds) == 15
    with pytest.raises(SystemExit, match="no results"):
        compare.collect(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*b.json: No such file"),
        ("{", "b.json is no valid JSON"),
        ('{"schema": "something/2"}', "b.json: schema 'something/2', expected"),
        ("[]", "b.json: schema None, expected"),
        ('{"schema": "dense2moe-benchmarks/1"}', "b.json lacks the sections stages, "),
    ],
)
def test_compare_says_in_a_line_what_is_wrong_with_a_file(
    tmp_path, monkeypatch, capsys, text, message
):
    good, bad = results_file(tmp_path / "a.json", BASE), tmp_path / "b.json"
    if text is not None:
        bad.write_text(text)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(good), str(bad)])
    with pytest.raises(SystemExit, match=message) as stop:
        compare.main()
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code  # exit status 1
    assert capsys.readouterr().out == ""


def test_compare_says_in_a_line_what_git_said(tmp_path):
    """As a program: nothing was measured, no work tree stays behind, no traceback."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("compare.py", "race.py", "results.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    def compared():
        return run(sys.executable, "benchmarks/compare.py", "--run", "no-such-branch", ".")

    if shutil.which("git") is None:
        pytest.skip("needs git")
    outside = compared()
    assert outside.returncode == 1 and "not a git repository" in outside.stderr
    run("git", "init", "-q")
    unknown = compared()
    assert unknown.returncode == 1 and unknown.stdout == ""
    assert "cannot check out 'no-such-branch'" in unknown.stderr
    for process in (outside, unknown):
        assert process.stderr.count("\n") == 1, process.stderr
    assert run("git", "worktree", "list").stdout.count("\n") == 1


# --- end to end -----------------------------------------------------------------------------


def test_gpu_script_rehearsal(tmp_path):
    """The script of the GPU machine runs here from end to end, with tiny sizes."""
    pytest.importorskip("pytest_benchmark")
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--rehearse", "--only", "host",
               "stages"]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert run.returncode == 0, run.stdout + log[-3000:]
    content = results.load(tmp_path / "out" / "cpu.json")
    stages = {row["stage"] for row in content["stages"]}
    assert stages == {"route", "permute", "combine", "grouped_gemm_up", "grouped_gemm_down"}
    assert len(content["host"]) == 2 and content["environment"]["size"] == "tiny"
    assert "build" not in run.stdout and "host" in run.stdout


@pytest.mark.slow
def test_gpu_script_rehearses_models_and_distillation(tmp_path):
    """A whole model in the modes that a CPU has, and a training step of each kind."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--rehearse", "--only",
               "models", "distill"]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                   "PYTEST_ADDOPTS": "-k 'flux-moe-s or shared or block_step'"}  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment,
                         timeout=600)  # fmt: skip
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert run.returncode == 0, run.stdout + log[-3000:]
    content = results.load(tmp_path / "out" / "cpu.json")
    assert [row["id"] for row in content["distillation"]] == ["digits/shared", "flux-double-block"]
    assert all(row["samples_per_second"] > 0 for row in content["distillation"])
    models = content["models"]
    assert set(models) == {"flux-dense", "flux-moe-s"} and content["skipped"] == []
    for model in models.values():
        assert model["mode"] == "compile" and model["latency_ratio"] > 0
        for mode in ("eager", "compile"):
            entry = model["modes"][mode]
            assert set(entry["image_seconds"]) == {"28", "8"}
            assert entry["peak_bytes"] > model["model_bytes"] and entry["step_seconds"] > 0
    assert models["flux-moe-s"]["modes"]["graphs"] == {
        "unavailable": "RuntimeError: CUDA graphs need a GPU"
    }
    assert models["flux-moe-s"]["latency_over_ideal"] > 0


def test_gpu_script_without_packages_says_what_was_not_measured(tmp_path):
    """diffusers and scikit-learn are blocked: every record that needs them is there as skipped."""
    pytest.importorskip("pytest_benchmark")
    blocked = "import sys; sys.modules['diffusers'] = sys.modules['sklearn'] = None"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    out = tmp_path / "out"
    command = ["bash", "benchmarks/gpu.sh", str(out), "--rehearse", "--only", "models", "blocks",
               "distill"]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(tmp_path)}  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment,
                         timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stdout + (out / "gpu.log").read_text()[-3000:]
    skipped = {row["id"]: row["why"] for row in results.load(out / "cpu.json")["skipped"]}
    assert set(skipped) == {
        *(f"flux-moe-{name}" for name in ("l", "m", "s", "xs")),
        *(f"digits/{stage}" for stage in ("shared", "moe", "mob")),
        "double/16+8", "single/16+8", "flux-double-block",
    }  # fmt: skip
    assert all(why.startswith("needs diffusers: ") for why in skipped.values())


def test_wheels_of_the_gpu_machine_are_all_listed():
    """What a listed package depends on is listed, or comes with torch, triton, numpy or pytest."""
    requirements = pytest.importorskip("packaging.requirements")

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    def needs(name):
        for text in metadata.requires(name) or []:
            requirement = requirements.Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield plain(requirement.name)

    def there(name):
        return any(metadata.distributions(name=name))

    listed = dict(re.findall(r"^(\S+)==(\S+)", GPU_WHEELS.read_text(), re.M))
    given, waiting = set(), ["torch", "triton", "numpy", "pytest"]
    while waiting:
        name = waiting.pop()
        if name not in given and there(name):
            waiting.extend(needs(name))
        given.add(name)
    assert given & set(listed) == {"setuptools"}  # torch has it, but any version of it will do
    known = [n for n, pin in listed.items() if there(n) and metadata.version(n) == pin]
    if not known:
        pytest.skip("none of the listed versions is installed")
    for name in known:
        lacking = set(needs(name)) - set(listed) - given
        assert not lacking, f"{name} needs {lacking}"


def test_gpu_script_help_is_its_comment():
    run = subprocess.run(["bash", "benchmarks/gpu.sh", "--help"], cwd=ROOT, capture_output=True,
                         text=True)  # fmt: skip
    assert run.returncode == 0 and run.stdout.startswith("Everything on a GPU in one go")
    assert run.stdout.rstrip().endswith("its numbers mean nothing.")
    assert not re.search(r"[{}$]|^set ", run.stdout, re.M), "shell code"


def test_gpu_script_lists_the_wheels_that_a_machine_lacks(tmp_path):
    def missing(*options):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" {" ".join(options)} "$@"\n')
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        run = subprocess.run(["bash", "benchmarks/gpu.sh", "--missing"], cwd=ROOT, text=True,
                             capture_output=True, env=environment)  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    listed = re.findall(r"^\S+==.*", GPU_WHEELS.read_text(), re.M)
    assert missing("-S", "-E") == listed  # a python without any package
    lacking = {line.split("==")[0] for line in missing()}
    there = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in metadata.distributions()}
    absent = {line.split("==")[0] for line in listed} - set(there)
    assert absent <= lacking
    for name in lacking - absent:
        least = re.search(rf"^{name}==.*# (\S+) or later$", GPU_WHEELS.read_text(), re.M)
        assert least and there[name] != least.group(1), f"{name} {there[name]} is there"

    old = tmp_path / "old" / "setuptools-65.5.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Name: setuptools\nVersion: 65.5.1\n")
    (tmp_path / "old" / "pybind11-2.13.0.dist-info").mkdir()
    (tmp_path / "old" / "pybind11-2.13.0.dist-info" / "METADATA").write_text(
        "Name: pybind11\nVersion: 2.13.0\n"
    )
    (tmp_path / "start.py").write_text(
        f"import sys; del sys.argv[0]; sys.path.append({str(tmp_path / 'old')!r})\n"
        "exec(sys.stdin.read())\n"
    )
    left = missing("-S", "-E", str(tmp_path / "start.py"))
    assert left == [line for line in listed if not line.startswith("pybind11==")]


def test_gpu_script_refuses_what_it_does_not_know():
    for arguments in (["out", "--only", "nonsense"], ["--nonsense"], []):
        run = subprocess.run(["bash", "benchmarks/gpu.sh", *arguments], cwd=ROOT,
                             capture_output=True, text=True)  # fmt: skip
        assert run.returncode == 2, arguments


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
