"""What a streamed conversion refuses, in words that say what to do, and what --verify finds."""

import json
import re

import pytest
import torch
from helpers.tiny_flux import dense_flux, random_orders, small_config
from safetensors.torch import load_file, save_file
from test_models_stream import convert, saved_dense

from d2m_models import MoEConfig
from d2m_models.checkpoints.restore import checkpoint_to_dense
from d2m_models.checkpoints.source import open_source
from d2m_models.checkpoints.verify import verify_checkpoint


@pytest.fixture
def dense(tmp_path):
    return saved_dense(tmp_path / "dense")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    """Applies change(name, tensor) -> tensor or None (drop) to every file of a folder."""
    for file in folder.glob("diffusion*.safetensors"):
        tensors = {n: change(n, t) for n, t in load_file(file).items()}
        save_file({n: t for n, t in tensors.items() if t is not None}, file)


def test_missing_and_truncated_shards(tmp_path, dense):
    file = sorted((tmp_path / "dense").glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated.*; download it again"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    file.write_bytes(whole[:5])
    with pytest.raises(ValueError, match="truncated, damaged or no safetensors"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    file.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ shards: {file.name}; download"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_not_enough_disk(tmp_path, dense, monkeypatch):
    usage = type("Usage", (), {"free": 65 << 20})
    monkeypatch.setattr("d2m_models.checkpoints.jobs.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"not enough disk space.* 0\.00 GB .*0\.07 GB are free"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())


def test_disk_that_fills_up_keeps_what_is_done(tmp_path, dense, monkeypatch):
    from d2m_models.checkpoints import jobs as jobs

    original, count = jobs.write_file, []

    def full(*args):
        count.append(1)
        if len(count) == 3:
            raise OSError(28, "No space left on device", str(args[0]))
        return original(*args)

    monkeypatch.setattr(jobs, "write_file", full)
    with pytest.raises(ValueError, match="No space left.*free some.*same command continues"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    before = len(list((tmp_path / "moe.partial").glob("*.safetensors")))
    assert before == 2
    convert(tmp_path / "dense", tmp_path / "moe", small_config())
    verify_checkpoint(tmp_path / "dense", tmp_path / "moe", progress=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"_class_name": "SD3Transformer2DModel"},
            "holds the class SD3Transformer2DModel; expected Flux",
        ),
        ({"_class_name": "FluxMoETransformer2DModel"}, "converted already; --to-dense"),
        ({"quantization_config": {"load_in_8bit": True}}, "is quantized; start from"),
        ({"num_layers": 3}, "lacks transformer_blocks.2"),
        ({"num_layers": 1}, "has unknown transformer_blocks.1"),
        ({"in_channels": 8}, r"x_embedder.weight is \[64, 16\], expected \[64, 8\]"),
    ],
)
def test_wrong_architecture(tmp_path, dense, change, words):
    edit_config(tmp_path / "dense", **change)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "dense", tmp_path / "moe", MoEConfig())
    assert not (tmp_path / "moe.partial").exists()


def test_dtype_surprises(tmp_path, dense):
    edit_tensors(tmp_path / "dense", lambda n, t: t.bfloat16() if "ff" in n else t)
    with pytest.raises(ValueError, match=r"mixes dtypes \(\d+ tensors in .*; choose one with --d"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    convert(tmp_path / "dense", tmp_path / "moe", small_config(), dtype=torch.bfloat16)
    fp8 = torch.float8_e4m3fn
    edit_tensors(tmp_path / "dense", lambda n, t: t.to(fp8) if "ff" in n else t)
    with pytest.raises(ValueError, match=r"float8_e4m3fn \(.*ff.*expected bf16, fp16 or fp32"):
        convert(tmp_path / "dense", tmp_path / "b", small_config(), dtype=torch.bfloat16)


def test_fp16_overflow_is_named(tmp_path, dense):
    edit_tensors(tmp_path / "dense", lambda n, t: t * 1e8 if n == "proj_out.weight" else t)
    with pytest.raises(ValueError, match="proj_out.weight has values beyond fp16"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config(), dtype=torch.float16)


def test_single_files_and_pickles(tmp_path, dense):
    name = "double_blocks.0.img_attn.qkv.weight"
    file = tmp_path / "flux1-dev.safetensors"
    save_file({name: torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=re.escape(f"name the file itself: {file}")):
        open_source(tmp_path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither diffusion_pytorch_model.safetensors nor"):
        open_source(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds pickles"):
        open_source(folder)


def test_targets_and_settings(tmp_path, dense, monkeypatch):
    source, target = tmp_path / "dense", tmp_path / "moe"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="already exists and is not empty"):
        convert(source, tmp_path / "full", small_config())
    with pytest.raises(ValueError, match="is for a compressed AdaLN"):
        convert(source, target, small_config(), keep_adaln=True)
    with pytest.raises(ValueError, match="pass --lora FILE"):
        edit_config(source, num_layers=19, num_single_layers=38)
        monkeypatch.setattr(
            "d2m_models.checkpoints.convert.check_dense_source", lambda _: dense_flux(19, 38)
        )
        convert(source, target, "hyper-flux-moe-l")
    with pytest.raises(ValueError, match="does not exist"):
        convert(tmp_path / "nothing", target, small_config())


def test_orders_are_checked(tmp_path, dense):
    orders = random_orders(dense)
    short = dict(list(orders.items())[1:])
    with pytest.raises(ValueError, match=r"lacks \['transformer_blocks.0.ff'\] \(1 of 8"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config(), neuron_order=short)
    twice = {**orders, "transformer_blocks.1.ff": torch.zeros(256, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"transformer_blocks.1.ff.*each of 0..255 once"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config(), neuron_order=twice)
    with pytest.raises(ValueError, match="none.safetensors does not exist"):
        convert(
            tmp_path / "dense", tmp_path / "moe", small_config(), neuron_order="none.safetensors"
        )
    save_file({n: o.int() for n, o in orders.items()}, tmp_path / "order.safetensors")
    for name, order in (("a", orders), ("b", tmp_path / "order.safetensors")):
        convert(tmp_path / "dense", tmp_path / name, small_config(), neuron_order=order)
    a, b = (
        {
            k: v
            for f in sorted((tmp_path / n).glob("*.safetensors"))
            for k, v in load_file(f).items()
        }
        for n in ("a", "b")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_begun_conversion_is_not_mixed_with_another(tmp_path, dense, monkeypatch):
    from d2m_models.checkpoints import jobs as jobs

    original, count = jobs.write_file, []

    def stop(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(jobs, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="other settings or another source .*different: seed"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config(), seed=1)
    file = sorted((tmp_path / "dense").glob("*.safetensors"))[0]
    file.touch()
    with pytest.raises(ValueError, match="different: source"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config())
    import fcntl

    with open(tmp_path / "moe.partial" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing"):
            convert(tmp_path / "dense", tmp_path / "moe", small_config())


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("transformer_blocks.0.ff.net.2.weight", "bit", "differs in 1 of"),
        ("single_transformer_blocks.3.proj_out.weight", "swap", "differs in"),
        ("transformer_blocks.1.ff.neuron_order", "order", "each of 0..255 once"),
        ("transformer_blocks.0.ff.router.weight", "zero", "constant or not finite"),
        ("transformer_blocks.1.norm1.linear.weight", "scale", "not the source's projection"),
        ("context_embedder.bias", "drop", "lacks context_embedder.bias"),
        ("adaln_down.weight", "scale", "not the source's projection"),
    ],
)
def test_verify_finds(tmp_path, dense, name, change, words):
    source, target = tmp_path / "dense", tmp_path / "moe"
    convert(source, target, small_config(adaln_dim=16), neuron_order=random_orders(dense))
    verify_checkpoint(source, target, progress=False)

    def spoil(key, tensor):
        if key != name:
            return tensor
        if change == "bit":
            tensor.view(torch.int32)[0, 0] ^= 1
        elif change == "swap":  # two columns, as a wrong permutation would
            tensor[:, [70, 71]] = tensor[:, [71, 70]]
        elif change == "order":
            tensor[0] = tensor[1]
        return {"zero": tensor * 0, "scale": tensor * 1.01, "drop": None}.get(change, tensor)

    edit_tensors(target, spoil)
    with pytest.raises(ValueError, match=words):
        verify_checkpoint(source, target, progress=False)
    with pytest.raises(ValueError, match="FluxMoETransformer2DModel"):
        checkpoint_to_dense(source, tmp_path / "back", progress=False)
