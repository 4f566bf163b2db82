"""Conversion on disk equals conversion in memory, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.tiny_flux import dense_flux, flux_inputs, random_orders, rel_error, small_config
from safetensors.torch import load_file, save_file

from d2m_models import FluxMoETransformer2DModel, MoBConfig, convert_flux
from d2m_models.checkpoints.convert import convert_checkpoint
from d2m_models.checkpoints.restore import checkpoint_to_dense
from d2m_models.checkpoints.verify import verify_checkpoint

ROOT = Path(__file__).parents[2]
MOB = MoBConfig(single_groups=((1, 2),))


def saved_dense(folder, dtype=torch.float32, **kwargs):
    dense = dense_flux(**kwargs).to(dtype)
    dense.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return dense


def convert(source, target, config, **kwargs):
    options = {"shard_bytes": 300_000, "progress": False, **kwargs}
    return convert_checkpoint(source, target, config, **options)


def state(folder):
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_equals_conversion_in_memory(tmp_path, dtype, guidance):
    dense = saved_dense(tmp_path / "dense", dtype, guidance=guidance)
    orders, config = random_orders(dense), small_config(mob=MOB)
    convert(tmp_path / "dense", tmp_path / "moe", config, neuron_order=orders)
    expected, found = convert_flux(dense, config, orders).state_dict(), state(tmp_path / "moe")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        if "router" not in name:
            assert torch.equal(found[name], tensor), name
        else:
            assert found[name].std() == pytest.approx(0.02, rel=0.3), name
    routers = [t for n, t in found.items() if n.endswith("router.weight")]
    assert not torch.equal(routers[0], routers[1])


def test_adaln_compression_equals_the_one_in_memory(tmp_path):
    dense = saved_dense(tmp_path / "dense")
    temb = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    save_file({"temb": temb}, tmp_path / "temb.safetensors")
    config = small_config(adaln_dim=16)
    record = convert(
        tmp_path / "dense", tmp_path / "moe", config,
        adaln_calibration=tmp_path / "temb.safetensors",
    )  # fmt: skip
    expected = convert_flux(dense, config, adaln_calibration=temb)
    found = FluxMoETransformer2DModel.from_pretrained(tmp_path / "moe")
    for model in (expected, found):
        model.set_top_k("dense")
    with torch.no_grad():
        outputs = [m(**flux_inputs()).sample for m in (found, expected)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    saved = json.loads((tmp_path / "moe" / "d2m_conversion.json").read_text())
    assert saved["adaln_error"] == record["adaln_error"]
    assert set(record["adaln_error"]) == set(expected.adaln_report)
    for name, error in expected.adaln_report.items():  # 16 of the 200 samples
        assert record["adaln_error"][name] == pytest.approx(error, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_for_bit(tmp_path, dtype):
    dense = saved_dense(tmp_path / "dense", dtype)
    config = small_config(mob=MOB, adaln_dim=16, dense_double_blocks=(0,))
    orders = random_orders(dense)
    convert(
        tmp_path / "dense", tmp_path / "moe", config, neuron_order=orders, keep_adaln=True
    )  # fmt: skip
    report = verify_checkpoint(tmp_path / "dense", tmp_path / "moe", progress=False)
    # one double block of two FFNs and four single blocks, three tensors each
    assert report.permuted == 3 * 6 and report.identical == len(dense.state_dict())
    checkpoint_to_dense(tmp_path / "moe", tmp_path / "back", shard_bytes=300_000, progress=False)
    found = state(tmp_path / "back")
    assert set(found) == set(dense.state_dict())
    for name, tensor in dense.state_dict().items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel" and "moe" not in config


def test_to_dense_wants_the_adaln_that_was_compressed(tmp_path):
    dense = saved_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", small_config(adaln_dim=16), keep_adaln=True)
    side = tmp_path / "moe" / "adaln_dense.safetensors"
    side.rename(tmp_path / "side.safetensors")
    with pytest.raises(ValueError, match="--keep-adaln"):
        checkpoint_to_dense(tmp_path / "moe", tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()
    checkpoint_to_dense(
        tmp_path / "moe", tmp_path / "back", adaln=tmp_path / "side.safetensors", progress=False
    )
    found = state(tmp_path / "back")
    assert all(torch.equal(found[n], t) for n, t in dense.state_dict().items())


def test_other_dtype_and_channels(tmp_path):
    """FLUX.1 Fill has more channels coming in than going out."""
    torch.manual_seed(0)
    dense = FluxTransformer2DModel(
        in_channels=24, out_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=24,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    dense.save_pretrained(tmp_path / "dense")
    config = small_config(1, 1)
    convert(tmp_path / "dense", tmp_path / "moe", config, dtype=torch.bfloat16)
    model = FluxMoETransformer2DModel.from_pretrained(
        tmp_path / "moe", dtype=torch.bfloat16
    ).float()
    model.set_top_k("dense")
    inputs = flux_inputs()
    inputs["hidden_states"] = torch.randn(2, 12, 24)
    with torch.no_grad():
        out, expected = model(**inputs).sample, dense(**inputs).sample
    assert out.shape == (2, 12, 8) and 0 < rel_error(out, expected) < 0.02
    verify_checkpoint(tmp_path / "dense", tmp_path / "moe", progress=False)


def test_a_pipelines_folder_and_a_hub_id(tmp_path, monkeypatch):
    saved_dense(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    convert(tmp_path / "pipe", tmp_path / "a", small_config())
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "pipe")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert("someone/flux", tmp_path / "b", small_config())
    assert asked[0][0] == "someone/flux"
    assert "transformer/diffusion_pytorch_model*.safetensors" in asked[0][1]
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


KILL = """
import sys, os, signal
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/models"]
import d2m_models.checkpoints.jobs as jobs, d2m_models.checkpoints.tensor_files as files
from test_models_stream import convert, small_config, MOB
count = 0
def killed(*args, point={point!r}):
    global count
    count += 1
    if count == {at}:
        if point == "within":
            args[0].write(bytes(args[1])[: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
owner, name = {{"within": (files, "_write"), "before": (jobs, "write_json")}}[{point!r}]
original = getattr(owner, name)
setattr(owner, name, killed)
convert({source!r}, {target!r}, small_config(adaln_dim=16, mob=MOB))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    "point, at", [("within", 30), ("within", 90), ("before", 1), ("before", 4)]
)
def test_killed_and_run_again(tmp_path, point, at):
    """SIGKILL in the midst of a tensor, or when a file is complete but not yet noted."""
    source, target = tmp_path / "dense", tmp_path / "moe"
    saved_dense(source)
    code = KILL.format(
        root=str(ROOT), point=point, at=at, source=str(source),
        target=str(target),
    )  # fmt: skip
    config = small_config(adaln_dim=16, mob=MOB)
    threads = str(torch.get_num_threads())  # the basis of the whole run below is rounded alike
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": threads}, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    partial = tmp_path / "moe.partial"
    before = {p.name: p.stat().st_mtime_ns for p in partial.glob("*-of-*.safetensors")}
    record = convert(source, target, config)
    assert not partial.exists() and not list(target.glob("*.tmp"))
    kept = [n for n, t in before.items() if (target / n).stat().st_mtime_ns == t]
    assert len(kept) >= len(before) - 1, "complete files were written again"
    convert(source, tmp_path / "whole", config)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        again = load_file(target / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(again[name], tensor), name
    whole = json.loads((tmp_path / "whole" / "d2m_conversion.json").read_text())
    assert whole["adaln_error"] == record["adaln_error"]


MEASURE = """
import resource, sys
sys.path[:0] = [{root!r}]
from d2m_models.checkpoints.convert import convert_checkpoint
from d2m_models import FluxMoEConfig
import torch; torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint({source!r}, {target!r}, FluxMoEConfig(num_layers=1, num_single_layers=4,
    dense_double_blocks=()), progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux")
def test_memory_is_a_few_tensors(tmp_path):
    """Blocks of full width, 1.9 GB in one file: a mapped or loaded file would show."""
    source = tmp_path / "dense"
    script = [sys.executable, ROOT / "benchmarks" / "make_random_flux.py", source]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*script, "--layers", "1", "4"], env=env, check=True)
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    code = MEASURE.format(root=str(ROOT), source=str(source), target=str(tmp_path / "moe"))
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    assert size > 1.8e9
    assert float(out.stdout.split()[-1]) < 1.0, "GiB above what the imports take"
