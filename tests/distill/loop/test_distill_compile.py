"""Compiled blocks: the same losses, little kept, nothing routed twice, nothing left behind."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from helpers.distill_cases import CONFIG, gradients, ready, run, same

from d2m_kernels import backends
from distill.loop.step import sped_up


@pytest.fixture
def traced(monkeypatch):
    """What `torch.compile` is given; it traces, but leaves out Inductor, which takes minutes."""
    real, given = torch.compile, []

    def quick(function, **options):
        given.append(function)
        return real(function, backend="aot_eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", quick)
    return given


@pytest.mark.slow
@pytest.mark.parametrize("kind, recompute", [("moe", False), ("moe", True), ("mob", True)])
def test_compiled_blocks_give_the_same(tmp_path, traced, kind, recompute):
    student, frozen, objective = ready(kind)
    names = set(student.state_dict())
    fast = replace(CONFIG, compile=True, gradient_checkpointing=recompute)
    log = run((student, frozen, objective), tmp_path / "compiled", fast)
    assert len(traced) == 6 and set(student.state_dict()) == names
    plain = run(ready(kind), tmp_path / "plain")
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in plain], rel=1e-3)


@pytest.mark.slow
def test_compiled_blocks_keep_little_and_route_once(traced, monkeypatch):
    """Checkpointing inside a compiled block: the layer runs again, its routing does not."""
    module = backends.module(backends.resolve(None, "cpu", torch.float32))
    calls, kept = [], {}

    def counted(name):
        real = getattr(module, name)

        def run(*args):
            streams = 1 if name == "route" else len(args[0])
            calls.extend([name] * streams)
            return real(*args)

        monkeypatch.setattr(module, name, run)

    for name in ("route", "ffn_fwd", "ffn_bwd"):
        counted(name)

    def step(recompute):
        made, sizes = ready(), {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        calls.clear()
        fast = replace(CONFIG, compile=True, gradient_checkpointing=recompute)
        with sped_up(made[0], fast), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _, _, grads = gradients(made, fast)
        for p in made[0].parameters():
            sizes.pop(p.untyped_storage().data_ptr(), None)
        kept[recompute] = sum(sizes.values())
        return grads, {name: calls.count(name) for name in ("route", "ffn_fwd", "ffn_bwd")}

    expected, once = step(False)
    grads, twice = step(True)
    same(grads, expected, 1e-5)
    assert once["ffn_fwd"] == once["ffn_bwd"] == once["route"] > 0
    assert twice == once | {"ffn_fwd": 2 * once["ffn_fwd"]}
    assert kept[True] < 0.5 * kept[False]


def test_the_next_stage_starts_with_plain_blocks(tmp_path, monkeypatch):
    """Compiled once a stage, not on top of the last; recomputed where the stage says so alone."""
    student, frozen, objective = ready()
    compiled, running = [], []

    def mark(function, dynamic):
        assert dynamic is None  # True for MoB groups alone
        compiled.append(function)
        return lambda *a, **k: function(*a, **k)

    monkeypatch.setattr(torch, "compile", mark)
    limit = torch._dynamo.config.recompile_limit

    def look(model, _):
        fast = "forward" in model.transformer_blocks[0].__dict__
        running.append((fast, model.gradient_checkpointing))
        # beyond the limit blocks run without a graph
        assert torch._dynamo.config.recompile_limit == (64 if fast else limit)

    student.register_forward_pre_hook(look)
    slow = replace(CONFIG, steps=1, gradient_checkpointing=True)
    fast = replace(slow, compile=True)
    # (compiled, checkpointed by the model): what is compiled is checkpointed inside
    runs = [(fast, (True, False))] * 2 + [(slow, (False, True)), (CONFIG, (False, False))]
    for i, (config, state) in enumerate(runs):
        running.clear()
        run((student, frozen, objective), tmp_path / str(i), config)
        assert set(running) == {state}
        assert not student.gradient_checkpointing
        assert not any("forward" in m.__dict__ for m in student.modules())
    assert len(compiled) == 12  # six blocks, twice
    inside = [inspect.getclosurevars(f).nonlocals["forward"] for f in compiled]
    kinds = student.transformer_blocks[0], student.single_transformer_blocks[0]
    assert {f.__func__ for f in inside} == {type(block).forward for block in kinds}

    def broken(step):
        assert "forward" in student.transformer_blocks[0].__dict__
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((student, frozen, broken), tmp_path / "broken", fast)
    assert not student.gradient_checkpointing
    assert not any("forward" in m.__dict__ for m in student.modules())
