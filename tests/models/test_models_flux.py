"""The converted FLUX: dense recovery, routed values, auxiliary outputs, gradient checkpointing."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.tiny_flux import (
    DIM,
    converted,
    dense_flux,
    flux_inputs,
    moe_by_hand,
    random_orders,
    rel_error,
    small_config,
)

from d2m_models import (
    FluxMoETransformer2DModel,
    MoEConfig,
    block_features,
    convert_flux,
    moe_layers,
    to_dense,
)


def run(model, inputs=None, **kwargs):
    with torch.no_grad():
        return model(**(inputs or flux_inputs()), **kwargs).sample


@pytest.mark.parametrize("guidance", [True, False])
def test_dense_recovery(guidance):
    dense = dense_flux(guidance=guidance)
    model = convert_flux(dense, MoEConfig(), random_orders(dense))
    model.set_top_k("dense")
    inputs = flux_inputs(guidance=guidance)
    torch.testing.assert_close(run(model, inputs), run(dense, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_dense_recovery_block_by_block(kind):
    """Each block on its own, so that an error in one cannot hide behind the others' residuals."""
    dense, model = converted()
    model.set_top_k("dense")
    name = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    args = (torch.randn(2, 12, DIM), torch.randn(2, 5, DIM), torch.randn(2, DIM))
    for ours, theirs in zip(getattr(model, name), getattr(dense, name), strict=True):
        assert any(n.endswith("router.weight") for n in ours.state_dict())
        for a, b in zip(ours(*args), theirs(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dense_recovery_in_bf16_is_as_good_as_bf16():
    dense, model = converted()
    model.set_top_k("dense")
    exact = run(dense)
    half = flux_inputs(dtype=torch.bfloat16)
    dense.bfloat16()
    model.bfloat16()
    ours, theirs = run(model, half).float(), run(dense, half).float()
    assert rel_error(ours, exact) <= 2 * rel_error(theirs, exact) + 1e-5


def test_conversion_leaves_the_dense_model_alone_and_shares_nothing():
    dense = dense_flux()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    model = convert_flux(dense, MoEConfig(), random_orders(dense))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_names_are_the_dense_models_and_weights_its_rows():
    dense, model = converted()
    extra = set(model.state_dict()) - set(dense.state_dict())
    assert all(k.endswith((".router.weight", ".neuron_order")) for k in extra)
    assert not set(dense.state_dict()) - set(model.state_dict())
    order = model.single_transformer_blocks[1].neuron_order.long()
    old, new = dense.single_transformer_blocks[1], model.single_transformer_blocks[1]
    assert torch.equal(new.proj_mlp.weight, old.proj_mlp.weight[order])
    assert torch.equal(new.proj_out.weight[:, DIM:], old.proj_out.weight[:, DIM + order])
    assert torch.equal(new.proj_out.weight[:, :DIM], old.proj_out.weight[:, :DIM])


@pytest.mark.parametrize("top_k", [0, 2])
def test_single_block_equals_the_formula(top_k):
    _, model = converted()
    block = model.single_transformer_blocks[0]
    block.top_k = top_k
    c, x, temb = torch.randn(1, 3, DIM), torch.randn(1, 4, DIM), torch.randn(1, DIM)
    s = torch.cat([c, x], 1)
    normed, gate = block.norm(s, emb=temb)
    mlp = moe_by_hand(
        normed[0], block.router.weight, block.proj_mlp.weight, block.proj_mlp.bias,
        block.proj_out.weight[:, DIM:], block.proj_out.bias, top_k, shared=DIM,
    )  # fmt: skip
    attn = block.attn(hidden_states=normed)[0].double() @ block.proj_out.weight[:, :DIM].T.double()
    expected = s[0] + gate * (attn + mlp)
    got = torch.cat(block(x, c, temb), 1)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_dense_blocks_stay_dense():
    dense, model = converted(dense_double_blocks=(0,), dense_single_blocks=(1, 2))
    assert set(moe_layers(model)) == {
        "transformer_blocks.1.ff",
        "transformer_blocks.1.ff_context",
        "single_transformer_blocks.0",
        "single_transformer_blocks.3",
    }
    model.set_top_k("dense")
    torch.testing.assert_close(run(model), run(dense), rtol=1e-5, atol=1e-5)


def test_to_dense_restores_every_tensor():
    dense, model = converted()
    back = to_dense(model)
    assert type(back) is FluxTransformer2DModel
    for name, value in dense.config.items():
        assert name.startswith("_") or back.config[name] == value, name
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_aux_has_the_names_and_values_that_hooks_see():
    dense, model = converted()
    model.set_top_k("dense")
    inputs = flux_inputs()
    out = model(**inputs, output_aux=True)
    torch.testing.assert_close(out.sample, model(**inputs).sample)
    with block_features(dense) as teacher, torch.no_grad():
        dense(**inputs)
    assert list(out.aux.features) == list(teacher)
    for name, (image, text) in teacher.items():
        assert image.shape == (2, 12, DIM) and text.shape == (2, 5, DIM)
        torch.testing.assert_close(out.aux.features[name][0], image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.aux.features[name][1], text, rtol=1e-4, atol=1e-5)
    model.set_top_k(2)
    sample, aux = model(**inputs, output_aux=True, return_dict=False)
    assert set(aux.routing) == set(moe_layers(model)) and not aux.mob
    assert aux.routing["transformer_blocks.0.ff_context"].ids.shape == (10, 2)
    assert aux.routing["single_transformer_blocks.0"].ids.shape == (34, 2)
    aux.routing["single_transformer_blocks.3"].probs.square().sum().backward()
    assert model.single_transformer_blocks[3].router.weight.grad.abs().sum() > 0


def loss_and_grads(model, checkpointing):
    model.zero_grad()
    if checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()
    out = model(**flux_inputs(), output_aux=True)
    balance = sum(r.probs.square().sum() for r in out.aux.routing.values())
    features = sum(f.square().mean() for pair in out.aux.features.values() for f in pair)
    loss = out.sample.square().mean() + 0.01 * balance + 0.1 * features
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("top_k", [0, 2, "dense"])
def test_gradient_checkpointing_changes_nothing(top_k):
    _, model = converted()
    model.train().set_top_k(top_k)
    loss, grads = loss_and_grads(model, False)
    again, checkpointed = loss_and_grads(model, True)
    torch.testing.assert_close(again, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


def test_checkpointing_does_not_route_twice():
    """Between forward and backward the router changes; the recomputation must keep the old ids."""
    _, model = converted()
    model.train().enable_gradient_checkpointing()
    layer = model.transformer_blocks[0].ff
    seen, choose = [], layer.choose

    def counting(*args):
        seen.append(choose(*args))
        return seen[-1]

    layer.choose = counting
    out = model(**flux_inputs())
    out.sample.sum().backward()
    assert len(seen) == 1


def test_token_mask_keeps_padding_out_of_routing():
    _, model = converted()
    inputs = flux_inputs()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    out = model(**inputs, output_aux=True, joint_attention_kwargs={"token_mask": mask})
    ids = out.aux.routing["transformer_blocks.0.ff_context"].ids.view(2, 5, 2)
    assert (ids[~mask] == -1).all() and (ids[mask] >= 0).all()
    ids = out.aux.routing["single_transformer_blocks.2"].ids.view(2, 17, 2)
    assert (ids[:, :5][~mask] == -1).all() and (ids[:, 5:] >= 0).all()
    assert (out.aux.routing["transformer_blocks.0.ff"].ids >= 0).all()


@pytest.mark.parametrize("repeat", [False, True])
def test_controlnet_residuals_as_in_flux(repeat):
    dense, model = converted()
    model.set_top_k("dense")
    residual = [torch.randn(2, 12, DIM) for _ in range(2)]
    kwargs = {
        "controlnet_block_samples": residual[:1] if repeat else residual,
        "controlnet_single_block_samples": residual,
        "controlnet_blocks_repeat": repeat,
    }
    expected = run(dense, **kwargs)
    assert rel_error(expected, run(dense)) > 0.1
    torch.testing.assert_close(run(model, **kwargs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: convert_flux(d, "flux-moe-l"), "19"),
        (lambda d: convert_flux(d, "flux"), "preset"),
        (lambda d: convert_flux(d, None), "config"),
        (lambda d: convert_flux(torch.nn.Linear(2, 2), MoEConfig()), "Linear"),
        (lambda d: convert_flux(d, MoEConfig(num_experts=11)), "256"),
        (lambda d: convert_flux(d, MoEConfig(), {"ff": torch.arange(256)}), "ff"),
        (lambda d: convert_flux(d, MoEConfig(), {}), "lacks"),
        (
            lambda d: convert_flux(d, MoEConfig(), {"transformer_blocks.0.ff": torch.arange(255)}),
            "transformer_blocks.0.ff",
        ),
        (lambda d: convert_flux(convert_flux(d, MoEConfig()), MoEConfig()), "already"),
        (lambda d: to_dense(d), "FluxMoE"),
        (
            lambda d: FluxMoETransformer2DModel(
                num_layers=0, num_single_layers=0, attention_head_dim=16, ff_dims={"x": 3}
            ),
            "x",
        ),
        (lambda d: FluxMoETransformer2DModel.from_single_file("a.safetensors"), "load_single"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(dense_flux())


def test_shapes_of_other_sizes_convert_too():
    """0.5S14E4A of the paper's Table 4."""
    dense = dense_flux()
    config = small_config(moe=MoEConfig(0.5, 0.25, 14, 4))
    model = convert_flux(dense, config, random_orders(dense))
    model.set_top_k("dense")
    torch.testing.assert_close(run(model), run(dense), rtol=1e-5, atol=1e-5)
