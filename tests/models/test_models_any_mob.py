"""MoB groups on models that are not FLUX.1."""

import pytest
import torch
from helpers.small_dits import B, build, tensors
from helpers.tiny_flux import rel_error
from torch import nn

from d2m_models import MoEShare, add_mob, convert, moe_layers, set_top_k

FAMILIES = {
    "Flux2Transformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "QwenImageTransformer2DModel": ["transformer_blocks"],
    "SD3Transformer2DModel": ["transformer_blocks"],
    "ZImageTransformer2DModel": ["layers"],
    "WanTransformer3DModel": ["blocks"],
    "PixArtTransformer2DModel": ["transformer_blocks"],
}


def sample(inputs: dict, i: int) -> dict:
    """The inputs of one sample."""

    def own(value):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == B:
            return value[i : i + 1]
        return value[i : i + 1] if isinstance(value, list) and len(value) == B else value

    return {name: own(value) for name, value in inputs.items()}


def grouped(name, experts=True, **options):
    model, inputs = build(name)
    if experts:
        convert(model, MoEShare())
    add_mob(model, {blocks: [(0, 1)] for blocks in FAMILIES[name]}, inputs, **options)
    return model, inputs


def choices(model, inputs):
    """The outputs, and what each group's router has chosen."""
    seen = []
    handles = [
        router.register_forward_hook(lambda _m, _args, out: seen.append(out[2].ids.tolist()))
        for router in model.mob_routers
    ]
    with torch.no_grad():
        found = tensors(model(**inputs))
    for handle in handles:
        handle.remove()
    return found, seen


def part_samples(router, args):
    """Gives a router the weights by which the first sample chooses other than the second."""
    y = nn.functional.normalize(args[2])
    difference = 1000 * (y[0] - y[1])
    with torch.no_grad():
        router.token_gate.weight.zero_()
        router.condition_gate.weight.copy_(torch.stack([difference, -difference]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_equals_its_samples_one_by_one(name):
    model, inputs = grouped(name)
    for router in model.mob_routers:
        router.register_forward_pre_hook(part_samples)
    choices(model, inputs)
    for router in model.mob_routers:
        router._forward_pre_hooks.clear()
    whole, seen = choices(model, inputs)
    assert all(ids[0] != ids[1] for ids in seen)
    for i in range(B):
        alone, own = choices(model, sample(inputs, i))
        assert own == [[ids[i]] for ids in seen]
        y, y_alone = whole[0], alone[0]
        if len(whole) == B:  # Z-Image takes and gives a list of samples
            y, y_alone = whole, alone
        torch.testing.assert_close(y[i], y_alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_blocks_active_is_the_dense_model_and_routers_learn(name):
    dense, inputs = build(name)
    with torch.no_grad():
        expected = tensors(dense(**inputs))
    names = set(dense.state_dict())
    model, _ = grouped(name, experts=False, active=2)
    assert {n for n in model.state_dict() if not n.startswith("mob_routers.")} == names
    for y, y_dense in zip(choices(model, inputs)[0], expected, strict=True):
        torch.testing.assert_close(y, y_dense, rtol=1e-5, atol=1e-5)
    model, _ = grouped(name)
    assert rel_error(choices(model, inputs)[0][0], expected[0]) > 1e-4
    set_top_k(model, 1)
    model.train()
    sum(y.square().sum() for y in tensors(model(**inputs))).backward()
    for key, parameter in model.mob_routers.named_parameters():
        assert parameter.grad.any(), key
    assert moe_layers(model)


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.linear, self.calls = nn.Linear(dim, dim), 0

    def forward(self, x, temb, step=0):
        self.calls += 1
        return x + self.linear(x) * temb[:, None]


class Toy(nn.Module):
    def __init__(self, kind="plain", blocks=4):
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x, temb):
        between = []
        for i, block in enumerate(self.blocks):
            x = block(x, temb, step=i if self.kind == "own" else 0)
            if self.kind == "changed":
                x = 2 * x
            between.append(x)
        return x + (between[1] if self.kind == "between" else 0)


def toy_inputs(samples=3):
    torch.manual_seed(0)
    return {"x": torch.randn(samples, 5, 8), "temb": torch.randn(samples, 8)}


def test_only_the_chosen_blocks_run_once():
    model = add_mob(Toy(), {"blocks": [(1, 2, 3)]}, toy_inputs(), active=2, select="run")
    before = [block.calls for block in model.blocks]
    _, ((chosen, *_),) = choices(model, {k: v[:1] for k, v in toy_inputs().items()})
    ran = [block.calls - n for block, n in zip(model.blocks, before, strict=True)]
    assert ran == [1, *(int(place in chosen) for place in range(3))]


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("own", "Block is given another 'step' in each block"),
        ("changed", r"Block cannot form a group: .* arguments as they are"),
        ("between", "Block form groups .* uses what is between"),
    ],
)
def test_a_signature_that_cannot_be_served_is_refused_by_name(kind, reason):
    model, inputs = Toy(kind), toy_inputs()
    expected = model(**inputs)
    with pytest.raises(ValueError, match=reason):
        add_mob(model, {"blocks": [(1, 2)]}, inputs)
    assert {type(block) for block in model.blocks} == {Block}
    assert not hasattr(model, "mob_routers") and torch.equal(model(**inputs), expected)


def test_other_refusals():
    with pytest.raises(ValueError, match="two samples or more, got 1"):
        add_mob(Toy(), {"blocks": [(1, 2)]}, toy_inputs(1))
    with pytest.raises(ValueError, match="name block 4, it has 4 blocks"):
        add_mob(Toy(), {"blocks": [(3, 4)]}, toy_inputs())
    with pytest.raises(ValueError, match="no condition for the router.*condition="):
        add_mob(Toy(), {"blocks": [(1, 2)]}, toy_inputs(), condition="step")
    model = add_mob(Toy(), {"blocks": [(1, 2)]}, toy_inputs())
    with pytest.raises(ValueError, match="already"):
        add_mob(model, {"blocks": [(1, 2)]}, toy_inputs())
    with pytest.raises(ValueError, match="before add_mob"):
        convert(model, MoEShare())
