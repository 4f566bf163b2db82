"""Whole FLUX.1-shaped models with random weights: dense, L, M, S, XS (Table 1 of the paper).

Every model runs beside dense in one process, in three modes: eager, regional compile
(`compile_repeated_blocks`), and a CUDA graph of a whole compiled step. Needs about 60 GB of GPU
memory; on a CPU only a rehearsal (--tiny) runs, and bench_blocks.py composes the ratios instead.
"""

from __future__ import annotations

import time

import flux
import pytest
import torch
from counting import launches_and_syncs, peak_bytes
from parts import split

from d2m_kernels import backends
from distill.roofline import account_of, ideal, work

TOKENS = {"tiny": (16, 8)}
NEEDED_GB = 60
STEPS = (28, 8)


def pytest_generate_tests(metafunc):
    if "preset" in metafunc.fixturenames:
        metafunc.parametrize("preset", ("flux-moe-l", "flux-moe-s", "flux-moe-xs", "flux-moe-m"))


@pytest.fixture(scope="module")
def dense(session):
    """The dense model, its inputs, and what was measured of it so far; or a skip."""
    if session.size != "tiny":
        if session.device.type != "cuda":
            pytest.skip("needs a GPU; bench_blocks.py composes the ratios on a CPU")
        free, _ = torch.cuda.mem_get_info(session.device)
        if free < NEEDED_GB * 1e9:
            pytest.skip(f"needs {NEEDED_GB} GB of free GPU memory, there are {free / 1e9:.0f}")
    return Model("flux-dense", session)


class Model:
    """A model with its inputs and its three ways to run a step."""

    def __init__(self, name, session):
        self.name, self.device, self.size = name, session.device, session.size
        self.image, self.text = TOKENS.get(session.size, (4096, 512))
        self.model = flux.build(name, session.size, self.device)
        if session.attention:
            self.model.set_attention_backend(session.attention)
        self.kwargs = flux.inputs(self.model, self.image, self.text, self.device)
        self.bytes = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        self.work = work(self.model, self.image, self.text)
        self.account = account_of(self.model, self.image, self.text)
        self.record: dict = {"modes": {}}
        self.error = 0.0

    def compile(self) -> None:
        backend = "aot_eager" if self.size == "tiny" else "inductor"
        self.model.compile_repeated_blocks(backend=backend, dynamic=False)

    def uncompile(self) -> None:
        for module in self.model.modules():
            module._compiled_call_impl = None

    def step(self):
        return self.model(**self.kwargs)

    def graph(self):
        """Replays a captured step; raises where a step cannot be captured."""
        if self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        if getattr(getattr(self.model, "d2m_config", None), "mob", None) is not None:
            raise RuntimeError("the block router's choice is read on the host")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.graph_output = self.step()
        return graph.replay

    def image_seconds(self, steps: int) -> float:
        """Seconds of `steps` Euler steps in a row, from idle to idle."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        flux.denoise(self.model, self.kwargs, steps)
        synchronize()
        return time.perf_counter() - start


def test_model(bench, dense, preset):
    # Every block of every model shares two compiled graphs; the limit is on variants of one code.
    torch._dynamo.config.recompile_limit = 64
    student = Model(preset, bench.session)
    student.error = error_to_reference(student)
    race = None
    with torch.inference_mode():
        for mode in ("eager", "compile", "graphs"):
            try:
                race = measure(bench, dense, student, mode) or race
            except Exception as error:  # noqa: BLE001 (what was measured before stays)
                text = " ".join(str(error).split())[:300]
                student.record["modes"][mode] = {"unavailable": f"{type(error).__name__}: {text}"}
            publish(bench, dense)
            publish(bench, student)
    if race is not None:
        bench.show(race, student.name)
    for model in (dense, student):
        model.uncompile()
    error, structure = student.error, student.model.d2m_config
    del student
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    assert race is not None, "no mode could be measured"
    assert structure.mob is not None or error < 0.15


def error_to_reference(student) -> float:
    """RMS of (velocity - the reference back-end's velocity) over the latter's RMS.

    Rounding may send a token whose two best logits nearly tie to another expert, layer after layer,
    so this is no tight bound; a MoB model may even choose another block.
    """
    layers = [m for m in student.model.modules() if getattr(m, "num_experts", 0)]
    with torch.inference_mode():
        got = student.step()[0].float()
        assert got.isfinite().all()
        for layer in layers:
            layer.backend = "reference"
        want = student.step()[0].float()
        for layer in layers:
            layer.backend = None
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


def measure(bench, dense, student, mode):
    """One mode of both models: step latency side by side, whole images, memory, dense's parts."""
    if mode == "compile":
        for model in (dense, student):
            model.compile()
    runs = {m.name: (m.graph() if mode == "graphs" else m.step) for m in (dense, student)}
    race = bench.race(runs, None, bench.rounds(9, 3), budget=15)
    for model in (dense, student):
        entry = model.record["modes"].setdefault(mode, {})
        entry["step_seconds"] = race.median(model.name)
        entry["seconds"] = race.to_json()[model.name]
        if mode == "graphs" or "image_seconds" in entry:
            continue
        entry["image_seconds"] = {str(n): model.image_seconds(n) for n in STEPS}
        entry["peak_bytes"] = model.bytes + peak_bytes(model.step, bench.device)
        # On a CPU operators are counted under a dispatch mode, and code that Dynamo has once met
        # under such a mode it never compiles again.
        if mode == "eager" or bench.device.type == "cuda":
            entry |= launches_and_syncs(model.step, bench.device)
    if mode != "graphs" and "parts" not in dense.record["modes"][mode]:
        dim = dense.model.inner_dim
        seconds = race.median(dense.name)
        dense.record["modes"][mode]["parts"] = split(dense.step, seconds, bench.device, dim)
    entry = student.record["modes"][mode]
    entry["latency_ratio"] = race.ratio(student.name, dense.name)
    entry["ratio_quartiles"] = race.spread(student.name, dense.name)
    entry["ratio_rounds"] = race.ratios(student.name, dense.name)
    # Dense's parts of this mode; a graph changes only what "rest" loses in launch gaps.
    parts = dict(dense.record["modes"]["compile" if mode == "graphs" else mode]["parts"])
    if mode == "graphs":
        parts["rest"] = max(0.0, race.median(dense.name) - sum(parts.values()) + parts["rest"])
    entry["ideal_seconds"] = ideal(parts, dense.work, student.work)
    entry["latency_over_ideal"] = race.median(student.name) / entry["ideal_seconds"]
    return race


def publish(bench, model) -> None:
    """The model's entry: the regional-compile mode up front, or the best that there is."""
    counts, modes = model.account, model.record["modes"]
    measured = {m: e for m, e in modes.items() if "step_seconds" in e}
    if not measured:
        return
    mode = next(m for m in ("compile", "eager", "graphs") if m in measured)
    front = measured[mode]
    flops = account_of("flux-dense").flops if bench.size != "tiny" else None
    record = {
        "mode": mode,
        "image_tokens": model.image,
        "text_tokens": model.text,
        "flops": counts.flops,
        "total_params": counts.total_params,
        "activated_params": counts.activated_params,
        "activated_params_paper": counts.activated_params_paper,
        "model_bytes": model.bytes,
        "error_to_reference": model.error,
        "modes": modes,
        "backend": backends.resolve(None, bench.device.type, torch.bfloat16),
        "attention": bench.session.attention or "diffusers' default",
        **{
            k: v
            for k, v in front.items()
            if k not in ("seconds", "ratio_quartiles", "ratio_rounds")
        },
    }
    if model.name == "flux-dense":
        record |= {"latency_ratio": 1.0, "flops_ratio": 1.0}
    elif "latency_ratio" in front:
        flops = flops or bench.results.content["models"]["flux-dense"]["flops"]
        record["flops_ratio"] = counts.flops / flops
        record["latency_over_flops"] = front["latency_ratio"] / record["flops_ratio"]
    bench.model(model.name, record)
    bench.model_line(model.name, record)
