"""Each name that torch and diffusers do not promise is taken away, and the way on is seen."""

import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from helpers.tiny_flux import dense_flux, flux_inputs, rel_error, small_config
from torch import nn

from d2m_models import convert_flux, effective_weight, private
from d2m_models.blocks import FluxMoETransformerBlock
from d2m_models.moe import can_run_together

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
ALL_HOOKS = (*HOOKS, "_backward_pre_hooks", "_backward_hooks", "_compiled_call_impl")


@pytest.fixture(scope="module")
def converted():
    dense = dense_flux()
    return dense, convert_flux(dense, small_config())


def test_every_name_is_there_today(converted):
    _, model = converted
    linear = nn.Linear(2, 2)
    assert all(hasattr(linear, name) for name in ALL_HOOKS)
    assert private.is_bare(linear) and private.fake_kinds()
    assert private.register_blocks(FluxMoETransformerBlock)
    assert model._parallel_config is None and hasattr(model, "_gradient_checkpointing_func")
    assert not isinstance(private.many_graphs(), type(private.nullcontext()))
    assert hasattr(linear.weight.untyped_storage(), "_cdata")
    assert all(hasattr(torch, f"_foreach_{name}") for name in ("mul_", "lerp_"))


class Without:
    """A module seen without one of its attributes."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.module, name)


@pytest.mark.parametrize("name", ALL_HOOKS)
def test_without_a_hook_dict_nothing_counts_as_bare(name):
    linear = Without(nn.Linear(4, 3), name)
    assert not private.is_bare(linear)
    assert private.is_hooked(linear) == (name in HOOKS)


def test_without_the_global_hooks_name_nothing_counts_as_bare(monkeypatch):
    monkeypatch.delattr(torch.nn.modules.module, "_has_any_global_hook")
    assert not private.is_bare(nn.Linear(4, 3))


def test_without_hook_dicts_the_model_computes_the_same(converted, monkeypatch):
    """Weights are then read by way of the Linears' own forward, and FFNs run one by one."""
    _, model = converted
    inputs = flux_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        monkeypatch.setattr("d2m_models.weights.is_hooked", lambda module: True)
        monkeypatch.setattr("d2m_models.private.is_hooked", lambda module: True)
        weight, bias = effective_weight(model.transformer_blocks[1].ff.net[2])
        assert torch.equal(weight, model.transformer_blocks[1].ff.net[2].weight)
        block = model.transformer_blocks[1]
        assert not can_run_together(block.ff, block.ff_context)
        assert rel_error(model(**inputs).sample, expected) < 1e-5


def test_without_fake_tensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._subclasses", None)
    monkeypatch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    assert private.fake_kinds() == ()
    with pytest.raises(RuntimeError, match="no FakeTensorMode where it was"):
        private.fake_mode()


def test_storages_without_an_address(monkeypatch):
    a = torch.zeros(4, device="meta")
    storage = a.untyped_storage()
    assert private.storage_key(a) == private.storage_key(a[1:])
    hidden = SimpleNamespace(untyped_storage=lambda: Without(storage, "_cdata"))
    assert private.storage_key(hidden) != private.storage_key(a)


def test_without_a_limit_of_graphs(monkeypatch):
    monkeypatch.setattr("torch._dynamo.config", object())
    with private.many_graphs():
        pass


@pytest.mark.parametrize("name", ["mul_", "lerp_"])
def test_one_tensor_after_another(monkeypatch, name):
    tensors = [torch.randn(3), torch.randn(2, 2)]
    arguments = [torch.tensor(0.3)] if name == "mul_" else [[t + 1 for t in tensors], 0.25]
    together = [t.clone() for t in tensors]
    private.foreach(name, together, *arguments)
    monkeypatch.delattr(torch, f"_foreach_{name}")
    private.foreach(name, tensors, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(together, tensors, strict=True))


def test_without_the_registry_of_blocks(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.hooks._helpers", None)
    assert private.register_blocks(FluxMoETransformerBlock) is False


def test_without_the_parallel_configuration(converted, monkeypatch):
    """One process goes on; among several, nobody knows whether tokens are split."""
    _, model = converted
    monkeypatch.delattr(ModelMixin, "_parallel_config")
    assert private.token_group(model) is None
    options = private.attention_options(object())
    assert options == {"backend": None, "parallel_config": None}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for look in (private.token_group, private.attention_options):
        with pytest.raises(RuntimeError, match="does not keep the parallel configuration"):
            look(model)


def test_without_the_mesh():
    config = SimpleNamespace(context_parallel_config=SimpleNamespace())
    with pytest.raises(RuntimeError, match="does not keep the context-parallel mesh"):
        private.token_group(SimpleNamespace(_parallel_config=config))


def test_checkpointing_without_diffusers_function():
    model = convert_flux(dense_flux(), small_config()).requires_grad_(True)
    inputs = flux_inputs()
    gradients = []
    for hide in (False, True):
        model.enable_gradient_checkpointing()
        if hide:
            del model._gradient_checkpointing_func
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
