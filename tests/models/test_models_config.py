"""Configuration: what is accepted, what is refused and how, and the round trip through JSON."""

import json
import subprocess
import sys

import pytest

from d2m_models.config import FluxMoEConfig, MoBConfig, MoEConfig
from d2m_models.presets import PRESETS, resolve_config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = PRESETS[name]
    assert FluxMoEConfig.from_json(config.to_json()) == config
    assert FluxMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_are_the_papers():
    moe = PRESETS["flux-moe-l"].moe
    assert (moe.expansion_ratio, moe.activated_ratio) == (4.0, 1.5)
    assert moe.sizes(3072, 12288) == (3072, 768)
    for name, double, single in (("l", 0, 0), ("m", 5, 0), ("s", 5, 3), ("xs", 5, 5)):
        config = PRESETS[f"flux-moe-{name}"]
        assert config.dense_double_blocks == (0, 1, 2) and config.adaln_dim == 256
        doubles = config.mob.double_groups if config.mob else ()
        singles = config.mob.single_groups if config.mob else ()
        assert [len(g) for g in doubles] == [3] * double
        assert [len(g) for g in singles] == [5] * single
        # the dense blocks, and the first and last block of the model, run always
        assert not {0, 1, 2} & {i for g in doubles for i in g}
        assert 37 not in {i for g in singles for i in g}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MoEConfig(num_experts=0), "num_experts"),
        (lambda: MoEConfig(num_experts=2.0), "num_experts"),
        (lambda: MoEConfig(top_k=13), "top_k"),
        (lambda: MoEConfig(top_k="all"), "top_k"),
        (lambda: MoEConfig(top_k=True), "top_k"),
        (lambda: MoEConfig(shared_ratio=-1), "shared_ratio"),
        (lambda: MoEConfig(expert_ratio=0), "expert_ratio"),
        (lambda: MoEConfig(routed_scale=float("nan")), "routed_scale"),
        (lambda: MoEConfig().sizes(64, 128), "128"),
        (lambda: MoEConfig(expert_ratio=0.01, num_experts=300).sizes(64, 256), "expert_ratio"),
        (lambda: MoEConfig.from_dict({"experts": 3}), "experts"),
        (lambda: MoBConfig(), "no groups"),
        (lambda: MoBConfig(double_groups=((1, 3),)), "consecutive"),
        (lambda: MoBConfig(double_groups=((1,),)), "two or more"),
        (lambda: MoBConfig(double_groups=((1, 2), (2, 3))), "two groups"),
        (lambda: MoBConfig(double_groups=((1, 2),), active=3), "active"),
        (lambda: MoBConfig(double_groups=((1, 2),), alpha=1.5), "alpha"),
        (lambda: MoBConfig(double_groups=((1, 2),), select="any"), "select"),
        (lambda: MoBConfig(double_groups=3), "double_groups"),
        (lambda: FluxMoEConfig(num_layers=2), "dense_double_blocks"),
        (lambda: FluxMoEConfig(num_layers=4, mob=MoBConfig(((3, 4),))), "block 4"),
        (lambda: FluxMoEConfig(adaln_dim=0), "adaln_dim"),
        (lambda: FluxMoEConfig(moe="big"), "moe"),
        (lambda: FluxMoEConfig.from_dict({"moe": {"topk": 2}}), "topk"),
        (lambda: resolve_config("flux-moe-q", 19, 38), "flux-moe-q"),
        (lambda: resolve_config("flux-moe-l", 2, 4), "19"),
        (lambda: resolve_config(3, 2, 4), "int"),
    ],
)
def test_bad_values_are_named(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_bare_moe_config_converts_everything():
    config = resolve_config(MoEConfig(), 2, 4)
    assert (config.dense_double_blocks, config.mob, config.adaln_dim) == ((), None, None)
    assert (config.num_layers, config.num_single_layers) == (2, 4)


def test_config_and_accounting_need_no_torch_and_no_diffusers():
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None);"
        "from d2m_models import account; print(account('flux-moe-l').total_params)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) > 8e9
