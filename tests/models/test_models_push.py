"""`d2m push` up to the network, and what it would upload, loaded as from the hub."""

import json

import pytest
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from helpers.flux_folder import flux_folder

from d2m_models import FluxMoETransformer2DModel, MoEConfig, convert_flux, load_pipeline
from d2m_models.inspection import push as pushing
from d2m_models.inspection.push import plan_push, push
from distill.cli import main

BASE = "black-forest-labs/FLUX.1-schnell"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("push")
    flux_folder(path / "base")
    dense = FluxTransformer2DModel.from_pretrained(path / "base", subfolder="transformer")
    model = convert_flux(dense, MoEConfig())
    model.register_to_config(origin={"state": "distilled", "base": str(path / "base")})
    model.save_pretrained(path / "moe")
    (path / "moe" / ".lock").touch()
    load_pipeline(path / "moe").save_pretrained(path / "pipe")
    return path


def write(uploads, folder):
    for upload in uploads:
        path = folder / upload.name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = upload.content
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


@pytest.mark.parametrize("model", ["moe", "pipe"])
def test_nothing_of_this_machine_is_uploaded(folder, model):
    uploads = plan_push(folder / model, "owner/name", BASE)
    names = [u.name for u in uploads]
    part = "transformer/" if model == "pipe" else ""
    assert {"README.md", f"{part}config.json", f"{part}flux_moe.py"} <= set(names)
    assert ".lock" not in names
    made = [u.content for u in uploads if isinstance(u.content, bytes)]
    texts = made + [
        u.content.read_bytes()
        for u in uploads
        if not isinstance(u.content, bytes) and u.name.endswith((".json", ".md"))
    ]
    assert not any(str(folder).encode() in text for text in texts)
    config = json.loads(next(u.content for u in uploads if u.name == f"{part}config.json"))
    assert config["origin"] == {"state": "distilled", "base": BASE}
    readme = next(u.content for u in uploads if u.name == "README.md").decode()
    assert f"base_model: {BASE}\nlicense: apache-2.0" in readme


def test_what_lies_on_the_hub_loads(folder, tmp_path, monkeypatch):
    """diffusers takes a class of ours from the hub only with a file of its own."""
    place = write(plan_push(folder / "pipe", "owner/name", BASE), tmp_path)
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    assert type(pipe.transformer) is FluxMoETransformer2DModel
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(place)


def test_a_dry_run_needs_no_network(folder, capsys, monkeypatch):
    monkeypatch.setattr(pushing, "push", None)
    assert main(["push", str(folder / "moe"), "owner/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "diffusion_pytorch_model.safetensors" in out and "nothing was uploaded" in out
    assert "license_name: as-the-base-model" in out  # the base is a folder of this machine


def test_one_commit_with_all_files(folder, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def create_repo(self, repository, **options):
            seen["repo"] = (repository, options)
            return "address"

        def create_commit(self, repository, operations, **_):
            seen["files"] = [o.path_in_repo for o in operations]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    uploads = plan_push(folder / "moe", "owner/name", BASE)
    assert push(uploads, "owner/name", private=True) == "address"
    assert seen["repo"] == ("owner/name", {"private": True, "exist_ok": True})
    assert seen["files"] == [u.name for u in uploads]


@pytest.mark.parametrize(
    ("model", "repository", "base", "says"),
    [
        ("moe", "name", None, "the repository is 'name'; expected owner/name"),
        ("nothing", "owner/name", None, "nothing does not exist"),
        ("base", "owner/name", None, "holds the class FluxTransformer2DModel"),
        ("moe", "owner/name", "/a/folder", "base is '/a/folder'; expected a hub id"),
    ],
)
def test_what_is_refused(folder, model, repository, base, says):
    with pytest.raises(ValueError, match=says):
        plan_push(folder / model, repository, base)
