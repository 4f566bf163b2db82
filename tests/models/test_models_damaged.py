"""Damaged checkpoints: one clear error, nothing half-written, never other weights in silence."""

import json
import shutil
import struct

import pytest
import torch

pytest.importorskip("hypothesis")

from helpers.tiny_flux import converted, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from d2m_models import FluxMoETransformer2DModel
from d2m_models.checkpoints.convert import convert_checkpoint
from d2m_models.checkpoints.load import load_model

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with "dense", "moe" (both of several shards), and what the former becomes."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in zip(("dense", "moe"), converted(), strict=True):
        model.save_pretrained(folder / name, max_shard_size="300KB")
    convert_checkpoint(folder / "dense", folder / "made", small_config(), progress=False)
    return folder


def split(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, rest):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def damaged_header(draw, data):
    header, rest = split(data)
    name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry, kind = header[name], draw(st.sampled_from(["offsets", "dtype", "shape", "gone", "kind"]))
    if kind == "offsets":
        by = draw(st.sampled_from([-64, -4, 4, 64, 1 << 40]))
        entry["data_offsets"] = [at + by for at in entry["data_offsets"]]
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(["BF17", "F64", "F16", "", 5, None]))
    elif kind == "shape":
        entry["shape"] = draw(st.sampled_from([[], [-1], "64", [10**30], None, [1 << 62, 4]]))
    elif kind == "gone":
        del header[name]
    else:
        header = draw(st.sampled_from([[], 1, {name: 5}, {name: {}}, {**header, name: None}]))
    return join(header, rest)


def damaged_file(draw, data):
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "empty", "longer", "header"]))
    if kind == "flip":
        data = bytearray(data)
        (length,) = struct.unpack("<Q", data[:8])
        for at in draw(st.lists(st.integers(0, 7 + length), min_size=1, max_size=3)):
            data[at] ^= draw(st.integers(1, 255))
        return bytes(data)
    if kind == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    return {"empty": b"", "longer": data + b"x"}.get(kind) or damaged_header(draw, data)


def damaged_index(draw, text):
    index = json.loads(text)
    places = index["weight_map"]
    name = draw(st.sampled_from(sorted(places)))
    kind = draw(st.sampled_from(["missing", "extra", "other", "tensor", "shard", "kind"]))
    if kind == "missing":
        places[name] = "diffusion_pytorch_model-00099-of-00099.safetensors"
    elif kind == "extra":
        places["nothing.weight"] = places[name]
    elif kind == "other":
        places[name] = draw(st.sampled_from(sorted(places.values())))
    elif kind == "tensor":
        del places[name]
    elif kind == "shard":
        index["weight_map"] = {n: f for n, f in places.items() if f != places[name]}
    else:
        maps = [{}, 5, [], {name: 5}, {name: []}]
        index = draw(st.sampled_from([[], 5, {}, *({"weight_map": m} for m in maps)]))
    return json.dumps(index)


def damage(draw, folder):
    """Something is wrong with one file of it."""
    kind = draw(st.sampled_from(["file", "file", "file", "index", "gone"]))
    file = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    if kind == "file":
        file.write_bytes(damaged_file(draw, file.read_bytes()))
    elif kind == "gone":
        file.unlink()
    else:
        (folder / INDEX).write_text(damaged_index(draw, (folder / INDEX).read_text()))


def tensors(folder):
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(found, want):
    return found.keys() == want.keys() and all(
        not found[name].is_meta and torch.equal(found[name], want[name]) for name in want
    )


def fuzz(count, check):
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data):
        check(data.draw)

    run()


COUNTS = pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])


@COUNTS
def test_a_damaged_checkpoint_is_converted_right_or_not_at_all(saved, tmp_path, count):
    want = tensors(saved / "made")

    def check(draw):
        shutil.rmtree(tmp_path)
        shutil.copytree(saved / "dense", tmp_path / "dense")
        damage(draw, tmp_path / "dense")
        try:
            convert_checkpoint(tmp_path / "dense", tmp_path / "out", small_config(), progress=False)
        except ValueError as err:
            assert str(tmp_path / "dense") in str(err)
            assert [p.name for p in tmp_path.iterdir()] == ["dense"]
        else:
            assert same(tensors(tmp_path / "out"), want)

    fuzz(count, check)


@COUNTS
@pytest.mark.parametrize("load", [load_model, FluxMoETransformer2DModel.from_pretrained])
def test_a_damaged_model_is_loaded_right_or_not_at_all(saved, tmp_path, count, load):
    want = tensors(saved / "moe")

    def check(draw):
        shutil.rmtree(tmp_path)
        shutil.copytree(saved / "moe", tmp_path / "moe")
        damage(draw, tmp_path / "moe")
        try:
            model = load(tmp_path / "moe")
        except Exception as err:  # diffusers raises many kinds, load_model one
            assert load is not load_model or (type(err) is ValueError and "moe" in str(err))
        else:
            assert same(model.state_dict(), want)

    fuzz(count, check)


def test_an_integer_where_a_float_was_is_named(saved, tmp_path):
    shutil.copytree(saved / "moe", tmp_path / "moe")
    file = sorted((tmp_path / "moe").glob("*.safetensors"))[0]
    header, rest = split(file.read_bytes())
    name = next(n for n, e in header.items() if n != "__metadata__" and e["dtype"] == "F32")
    header[name]["dtype"] = "I32"
    file.write_bytes(join(header, rest))
    with pytest.raises(ValueError, match=f"holds torch.int32 .{name}.; expected bf16"):
        load_model(tmp_path / "moe")


def test_a_tensor_in_two_shards_is_refused(saved, tmp_path):
    shutil.copytree(saved / "dense", tmp_path / "dense")
    first, second = sorted((tmp_path / "dense").glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="which another shard holds as well"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", small_config())
