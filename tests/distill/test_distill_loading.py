"""What comes from outside is read from safetensors; a pickle, which may hold any code, is not."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("diffusers")

from helpers.tiny_flux import converted, dense_flux

from d2m_models.checkpoints.load import load_model
from d2m_models.checkpoints.lora_file import read_lora
from d2m_models.inspection.differences import diff_checkpoints
from distill.configs.sections import DataConfig, TeacherConfig
from distill.errors import UserError
from distill.teacher import load_teacher


@pytest.fixture(autouse=True)
def unpickled(monkeypatch):
    """Calls of torch.load; none may come."""
    calls, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(a) or real(*a, **k))
    yield calls
    assert calls == []


def load(path):
    return load_teacher(TeacherConfig(path=str(path)), DataConfig(), 0)


@pytest.mark.parametrize("size", ["10GB", "1MB"])
def test_a_pickled_teacher_is_refused(tmp_path, size):
    """In one file and in several; from a pipeline's folder too; saved as safetensors it loads."""
    dense = dense_flux()
    dense.save_pretrained(tmp_path / "transformer", safe_serialization=False, max_shard_size=size)
    names = [p.name for p in (tmp_path / "transformer").iterdir()]
    assert any(n.endswith(".bin") for n in names) and (len(names) > 2) == (size == "1MB")
    (tmp_path / "model_index.json").write_text("{}")
    for path in (tmp_path / "transformer", tmp_path):
        with pytest.raises(UserError, match=r"transformer holds pickles .*only safetensors are"):
            load(path)
    shutil.rmtree(tmp_path / "transformer")
    dense.save_pretrained(tmp_path / "transformer", max_shard_size=size)
    again = load(tmp_path).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in dense.state_dict().items())


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path):
    dense_flux().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"no pickle")
    load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot load a FLUX transformer"):
        load(tmp_path)


def test_a_pickled_student_is_refused(tmp_path):
    dense, student = converted()
    dense.save_pretrained(tmp_path / "dense")
    student.save_pretrained(tmp_path / "moe", safe_serialization=False)
    with pytest.raises(ValueError, match="moe holds pickles"):
        load_model(tmp_path / "moe")
    with pytest.raises(ValueError, match="moe holds pickles"):
        diff_checkpoints(str(tmp_path / "dense"), str(tmp_path / "moe"))


def test_a_pickled_lora_is_refused(tmp_path, unpickled):
    path = tmp_path / "lora.bin"
    torch.save({"transformer.x_embedder.lora_A.weight": torch.zeros(4, 16)}, path)
    with pytest.raises(ValueError, match=r"lora.bin is no .safetensors file"):
        read_lora(path)
    path = path.rename(path.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match="cannot read the LoRA"):
        read_lora(path)
