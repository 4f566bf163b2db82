"""The tables and plots: inspect, diff, MoB group proposals; and the commands that print them."""

import re

import pytest
import torch
from helpers.tiny_flux import (
    converted,
    dense_flux,
    flux_inputs,
    mob_flux,
    random_orders,
    small_config,
)
from safetensors.torch import load_file, save_file

from d2m_models import (
    PRESETS,
    FluxMoETransformer2DModel,
    MoBConfig,
    account,
    convert_flux,
    diff,
    draw_block_mse,
    inspect,
    measure_block_mse,
    propose_groups,
)
from d2m_models.inspection.table import PAPER, draw, family_table, module_table
from distill.cli import main


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_presets_beside_the_papers_columns(tmp_path):
    found = [inspect(name) for name in PAPER]
    table = family_table(found)
    for name, (flops, params) in PAPER.items():
        row = next(line for line in table.splitlines() if line.startswith(name)).split()
        assert row[4] == f"{params:.2f}" and row[7] == f"{flops:.2f}"
        # by the paper's own way of counting, parameters and half attention come close to its own
        assert float(row[3]) == pytest.approx(params, rel=5e-3), name
        assert float(row[6]) == pytest.approx(flops, rel=0.055), name
    assert is_png(draw(found, tmp_path / "a.png"))


def test_modules_add_up():
    lines = module_table(inspect("flux-moe-s")).splitlines()
    parts = [line for line in lines[2:] if not line.startswith(("all", "the paper"))]
    numbers = [[float(c.replace(",", "")) for c in line.split()[-5:]] for line in parts]
    total = next(line for line in lines if line.startswith("all")).split()[1:]
    for column, whole in zip(zip(*numbers, strict=True), total, strict=True):
        assert sum(column) == pytest.approx(float(whole.replace(",", "")), rel=1e-3)
    a = account("flux-moe-s")
    assert float(total[0].replace(",", "")) == pytest.approx(a.total_params / 1e6, abs=0.06)
    assert float(total[3]) == pytest.approx(a.flops / 1e12, abs=1e-3)


def test_hyper_presets_are_the_same_structures():
    assert inspect("hyper-flux-moe-l").counts == inspect("flux-moe-l").counts
    for bad in ("hyper-flux-lite", "flux"):
        with pytest.raises(ValueError, match="preset"):
            inspect(bad)


def test_a_folder_is_inspected_without_its_weights(tmp_path, capsys):
    _, model = mob_flux()
    model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    found = inspect(str(tmp_path))
    assert found.counts == account(model) and found.paper is None
    assert main(["inspect", str(tmp_path)]) == 0
    assert re.search(r"^feed-forward +[\d.]+", capsys.readouterr().out, re.M)


def test_inspect_command(tmp_path, capsys):
    plot = tmp_path / "presets.png"
    assert main(["inspect", "presets", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS) and is_png(plot)
    assert main(["inspect", "flux-moe-l", "--size", "512"]) == 0
    assert "the paper" not in capsys.readouterr().out  # its figures are for 1024 x 1024
    assert main(["inspect", "flux-moe-l", "--plot", "x.pdf"]) == 2
    assert "PNG" in capsys.readouterr().err


def test_diff_finds_the_layer_that_was_changed():
    dense, model = converted(adaln_dim=64)
    model.set_top_k("dense")
    with torch.no_grad():
        model.single_transformer_blocks[2].proj_out.weight.mul_(1.1)
    errors = diff(dense, model, **flux_inputs())
    assert next(iter(errors)) == "single_transformer_blocks.2"
    worst, *others = errors.values()
    assert worst.own_image > 0.05 and all(e.worst < 1e-4 for e in others)
    after = errors["single_transformer_blocks.3"]
    assert after.output_image > 1e-3 > errors["single_transformer_blocks.1"].output_image
    values = [e.worst for e in errors.values()]
    assert values == sorted(values, reverse=True)


def test_diff_of_routed_and_grouped_blocks():
    dense, model = mob_flux()
    errors = diff(dense, model, **flux_inputs())
    assert len(errors) == 3 + 4
    # within a group only the last block has an output to compare
    assert errors["transformer_blocks.1"].output_image is None
    assert errors["transformer_blocks.2"].output_image > 0.01
    assert all(0 < e.own_image < 2 for e in errors.values())
    with pytest.raises(ValueError, match="teacher has 2"):
        diff(dense_flux(2, 4), model, **flux_inputs())


def test_convert_and_diff_commands(tmp_path, capsys):
    dense = dense_flux()
    dense.save_pretrained(tmp_path / "dense", max_shard_size="300KB")
    orders = random_orders(dense)
    save_file({n: o.int() for n, o in orders.items()}, tmp_path / "order.safetensors")
    structure = tmp_path / "s.yaml"
    structure.write_text(
        "{num_layers: 2, num_single_layers: 4, dense_double_blocks: [], adaln_dim: 16}"
    )
    d, m, b = (str(tmp_path / n) for n in ("dense", "moe", "back"))
    command = ["convert", d, m, "--structure", str(structure), "--order",
               str(tmp_path / "order.safetensors"), "--keep-adaln", "--verify"]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "verified: " in out and re.search(r"AdaLN compression: relative error \d+\.\d\d%", out)
    assert main(command) == 0  # DST is there: only verified again
    assert "wrote" not in capsys.readouterr().out
    assert main(["convert", m, b, "--to-dense", "--quiet"]) == 0
    back = {
        k: v for f in (tmp_path / "back").glob("*.safetensors") for k, v in load_file(f).items()
    }
    assert all(torch.equal(back[n], t) for n, t in dense.state_dict().items())
    capsys.readouterr()
    plot = str(tmp_path / "diff.png")
    assert main(["diff", d, m, "--top-k", "dense", "--image-tokens", "16", "--plot", plot]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("block") and is_png(tmp_path / "diff.png")
    own = [float(line.split()[1]) for line in table[2:8]]
    assert len(own) == 6
    for bad, words in (
        (["convert", m, b, "--to-dense", "--keep-adaln"], "--keep-adaln goes with --preset"),
        (["convert", d, m, "--preset", "flux-moe-l", "--adaln", "x"], "--adaln goes with --to-d"),
        (["diff", d, "nothing"], "nothing does not exist"),
        (["diff", d, m, "--image-tokens", "15"], "square"),
    ):
        assert main(bad) == 2
        assert words in capsys.readouterr().err


def test_measured_mse_is_the_blocks_own(tmp_path):
    dense = dense_flux()
    with torch.no_grad():  # a block that hardly changes its input, and one that changes it much
        dense.single_transformer_blocks[2].norm.linear.weight.mul_(1e-3)
        dense.single_transformer_blocks[2].norm.linear.bias.mul_(1e-3)
        dense.single_transformer_blocks[1].proj_out.weight.mul_(5)
    measured = measure_block_mse(dense, [flux_inputs(seed=s) for s in (1, 2)])
    assert measured.values["single"].shape == (4, 4) and measured.values["double"].shape == (4, 2)
    mean = measured.values["single"].mean(0)
    assert mean.argmin() == 2 and mean.argmax() == 1
    seen = {}
    dense.single_transformer_blocks[0].register_forward_hook(
        lambda m, a, k, out: seen.update(k, out=out), with_kwargs=True
    )
    with torch.no_grad():
        dense(**flux_inputs(seed=1))
    before = torch.cat([seen["hidden_states"], seen["encoder_hidden_states"]], 1)
    after = torch.cat([seen["out"][1], seen["out"][0]], 1)
    by_hand = (after - before).square().mean((1, 2))
    torch.testing.assert_close(measured.values["single"][:2, 0], by_hand)
    assert is_png(draw_block_mse(measured, tmp_path / "mse.png", "single", ((1, 2),)))
    groups = propose_groups(mean, count=1, size=2)
    model = convert_flux(dense, small_config(mob=MoBConfig(single_groups=groups)))
    assert isinstance(model, FluxMoETransformer2DModel)


def choices(runs, number, start=0):
    """Every set of `number` disjoint runs."""
    if number == 0:
        yield ()
        return
    for run in runs:
        if run[0] >= start:
            for rest in choices(runs, number - 1, run[-1] + 1):
                yield (run, *rest)


def test_proposed_groups_are_the_best_ones():
    g = torch.Generator().manual_seed(0)
    for count, size in ((1, 3), (2, 3), (3, 2)):
        mse = torch.rand(11, generator=g)
        found = propose_groups(mse, count, size)
        runs = [tuple(range(i, i + size)) for i in range(1, 11 - size)]

        def cost(groups, mse=mse):
            return sum(float(mse[i].log()) for group in groups for i in group)

        assert cost(found) == pytest.approx(min(map(cost, choices(runs, count))))
        MoBConfig(single_groups=found)
    for bad in ({"count": 4, "size": 3}, {"count": 0, "size": 3}, {"count": 1, "size": 1}):
        with pytest.raises(ValueError):
            propose_groups(torch.rand(11), **bad)
