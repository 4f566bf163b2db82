"""The model card (README.md) of a saved model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2m_models.checkpoints.origin import is_hub_id, read_origin
from d2m_models.files import write_text
from d2m_models.inspection.table import inspect, module_table

# licence and its name on the hub; a model made of the base stays under it
LICENCES = {
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-Fill-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-Kontext-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None),
}
LINKS = {"flux-1-dev-non-commercial-license": "https://huggingface.co/black-forest-labs/FLUX.1-dev"}


def write_card(folder: Path, name: str | None = None) -> None:
    """README.md of a saved model, from its config.json and d2m_conversion.json."""
    write_text(folder / "README.md", card(folder, read_origin(folder), name or folder.name))


def card(folder: Path, origin: Mapping[str, Any], name: str) -> str:
    """The model card: what it was made of, its licence, the recipe, counts, how to load it.

    Args:
        folder: of the transformer. origin: as in its configuration.
        name: by which it is loaded, a folder or a hub id.
    """
    base = origin.get("base") if is_hub_id(origin.get("base")) else None
    snippet = f'''```python
from d2m_models import load_pipeline

pipe = load_pipeline("{name}", base="{base or "FOLDER_OR_HUB_ID_OF_THE_BASE"}")
image = pipe("a cat").images[0]
```'''
    state = {"converted": "**Converted, not distilled**: the weights are the dense model's, its "
             "routers choose at random. Its images are of no use before it is distilled.",
             "distilled": "Distilled from the dense model."}  # fmt: skip
    parts = [
        _front_matter(base),
        f"# {name}",
        f"A Mixture of Experts made of {base or 'a dense diffusion transformer'} by dense2moe "
        "([Dense2MoE](https://arxiv.org/abs/2510.09094)). "
        + state.get(origin.get("state", ""), "Nothing is recorded about its training."),
        "## Use\n\n`pip install 'dense2moe[flux]'`, then\n\n" + snippet,
        f"## Recipe\n\n{_recipe(folder, origin)}",
        "## Size\n\nParameters and FLOPs of a forward at 1024 x 1024 with 512 text tokens, "
        f"counted:\n\n```text\n{module_table(inspect(folder))}\n```",
        f"## Licence\n\n{_licence_words(base)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str | None) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:"]
    lines += [f"- {tag}" for tag in ("dense2moe", "mixture-of-experts")]
    if base is not None:
        lines.append(f"base_model: {base}")
    licence, own_name = LICENCES.get(base or "", ("other", "as-the-base-model"))
    lines.append(f"license: {licence}")
    if own_name:
        lines.append(f"license_name: {own_name}")
    if own_name in LINKS:
        lines.append(f"license_link: {LINKS[own_name]}/blob/main/LICENSE.md")
    return "\n".join(["---", *lines, "---"])


def _licence_words(base: str | None) -> str:
    licence, own_name = LICENCES.get(base or "", (None, None))
    if licence is None:
        return f"That of the model it was made of{f', {base}' if base else ''}."
    return f"That of {base}: {own_name or licence}."


def _recipe(folder: Path, origin: Mapping[str, Any]) -> str:
    rows = {"base": origin.get("base") if is_hub_id(origin.get("base")) else None,
            "preset": origin.get("preset")}  # fmt: skip
    record = folder / "d2m_conversion.json"
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        order = found["neuron_order"]
        rows["neuron order"] = "that of the dense model" if order == "dense" else f"given ({order})"
        if errors := found["adaln_error"].values():
            rows["AdaLN"] = (
                f"calibrated on {found['adaln_calibration']} samples, relative error "
                f"{sum(errors) / len(errors):.2%} on average, {max(errors):.2%} at worst"
            )
        if found["lora"]:
            rows["LoRA fused first"] = found["lora"]
    for key in ("initialisation", "routers"):
        rows[key] = origin.get(key)
    for stage in origin.get("stages", ()):
        rows[f"stage {stage['stage']}"] = ", ".join(
            f"{key} {stage[key]}" for key in ("steps", "batch_size", "lr") if key in stage
        )
    rows["data"] = origin.get("data")
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else "Not recorded."
