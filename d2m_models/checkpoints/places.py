"""What a path to a model can be, by its name and its files alone."""

from __future__ import annotations

from pathlib import Path


def may_be_hub_name(path: Path | str) -> bool:
    """Whether "owner/name" can be meant, where there is no such folder."""
    return not str(path).startswith((".", "/", "~")) and str(path).count("/") == 1


def refuse_pickles(folder: Path) -> None:
    """An error that says so where a folder's weights are in a pickle, which may hold any code."""
    files = sorted(f.name for f in folder.glob("diffusion_pytorch_model*"))
    if any(".bin" in f for f in files) and not any(".safetensors" in f for f in files):
        raise ValueError(
            f"{folder} holds pickles ({files[0]}); only safetensors are read: load it with "
            "diffusers where you trust it, and save it again"
        )
