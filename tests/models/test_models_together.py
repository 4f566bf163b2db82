"""A double block's image and text FFN in one `moe_ffn_pair`: never another result, never a hook
passed by."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_flux import dense_flux, flux_inputs, random_orders, small_config

from d2m_kernels import moe_ffn_pair
from d2m_models import MoEConfig, blocks, convert_flux, moe


def converted(**kwargs):
    dense = dense_flux()
    return convert_flux(dense, small_config(moe=MoEConfig(), **kwargs), random_orders(dense))


@pytest.fixture
def pairs(monkeypatch):
    """Every call of moe_ffn_pair from a model, appended as it happens."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return moe_ffn_pair(*args, **kwargs)

    monkeypatch.setattr(moe, "moe_ffn_pair", counted)
    return calls


def outputs_and_gradients(model, **extra):
    out = model(**flux_inputs(), **extra).sample
    leaves = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out, *(g for g in grads if g is not None)]


def compare(model, pairs, monkeypatch, times=2, **extra):
    together = outputs_and_gradients(model, **extra)
    assert len(pairs) == times
    monkeypatch.setattr(blocks, "can_run_together", lambda *_: False)
    apart = outputs_and_gradients(model, **extra)
    assert len(pairs) == times
    assert len(together) == len(apart) > 8
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("top_k", [0, 2, "dense"])
def test_the_same_bits_as_apart(pairs, monkeypatch, top_k):
    model = converted()
    model.set_top_k(top_k)
    compare(model, pairs, monkeypatch)


def test_under_gradient_checkpointing(pairs, monkeypatch):
    model = converted().train()
    model.enable_gradient_checkpointing()
    compare(model, pairs, monkeypatch, times=4)


def test_with_lora(pairs, monkeypatch):
    from peft import LoraConfig

    model = converted()
    model.add_adapter(
        LoraConfig(
            r=4, target_modules=["ff.net.0.proj", "ff_context.net.2"], init_lora_weights=False
        )
    )
    compare(model, pairs, monkeypatch)


def test_streams_of_other_sizes_still_agree(pairs, monkeypatch):
    model = converted()
    model.transformer_blocks[0].ff.top_k = 3
    compare(model, pairs, monkeypatch)


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "replaced forward", "weight hook"])
def test_what_hangs_on_a_layer_is_not_passed_by(pairs, kind):
    model = converted()
    expected = model(**flux_inputs()).sample
    pairs.clear()
    seen = []
    for layer in (model.transformer_blocks[0].ff, model.transformer_blocks[1].ff_context):
        if kind == "forward hook":
            layer.register_forward_hook(lambda *_: seen.append(1))
        elif kind == "pre-hook":
            layer.register_forward_pre_hook(lambda *_: seen.append(1))
        elif kind == "weight hook":
            layer.net[2].register_forward_pre_hook(lambda *_: seen.append(1))
        else:
            own = layer.forward
            layer.forward = lambda *a, own=own, **k: seen.append(1) or own(*a, **k)
    assert torch.equal(model(**flux_inputs()).sample, expected)
    assert len(seen) == 2 and not pairs


@pytest.mark.parametrize("top_k", [0, 2, "dense"])
def test_the_blocks_adaln_goes_along(pairs, monkeypatch, top_k):
    """In inference, where the back-end fuses it; here the CPU's is made to believe that it does."""
    model = converted()
    model.set_top_k(top_k)
    inputs = flux_inputs()
    with torch.no_grad():
        expected = model(**inputs, output_aux=True)
        monkeypatch.setattr(blocks, "fuses_adaln", lambda *_: True)
        pairs.clear()
        got = model(**inputs, output_aux=True)
    assert len(pairs) == 2 and all(s.residual is s.x for pair in pairs for s in pair)
    torch.testing.assert_close(got.sample, expected.sample, rtol=1e-5, atol=1e-5)
    for name, routing in expected.aux.routing.items():
        assert torch.equal(got.aux.routing[name].ids, routing.ids), name


def test_adaln_stays_apart_in_training_and_under_hooks(pairs, monkeypatch):
    monkeypatch.setattr(blocks, "fuses_adaln", lambda *_: True)
    model, inputs, seen = converted(), flux_inputs(), []
    model(**inputs)
    assert len(pairs) == 2 and all(s.residual is None for pair in pairs for s in pair)
    for block in model.transformer_blocks:
        block.norm2.register_forward_hook(lambda *_: seen.append(1))
    pairs.clear()
    with torch.no_grad():
        model(**inputs)
    assert len(seen) == len(pairs) == 2
    assert all(s.residual is None for pair in pairs for s in pair)
