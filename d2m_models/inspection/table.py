"""`d2m inspect`: what a model holds and what a forward costs, as a table beside the paper's.

B is 1e9 parameters, T is 1e12 FLOPs (two per multiply-add).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m_models.checkpoints.places import may_be_hub_name
from d2m_models.config import FluxMoEConfig
from d2m_models.inspection.accounting import Account, account
from d2m_models.presets import PRESETS

# arXiv 2510.09094, Table 1: FLOPs of a forward in T and activated parameters in B
PAPER = {
    "flux-dev": (66.0, 11.9),
    "flux-lite": (53.15, 8.16),
    "flux-moe-l": (43.42, 5.15),
    "flux-moe-m": (35.7, 4.01),
    "flux-mini": (17.37, 3.18),
    "flux-moe-s": (26.43, 3.19),
    "flux-moe-xs": (20.26, 2.64),
}
DENSE = {"flux-dev": FluxMoEConfig(moe=None, dense_double_blocks=())}
LABELS = {
    "conditioning": "time/text embedders",
    "in_out": "input and output",
    "adaln": "AdaLN",
    "attention": "attention",
    "ffn": "feed-forward",
    "routers": "block routers",
}


@dataclass(frozen=True)
class Inspection:
    """The account of one model and, for a preset, the paper's (FLOPs in T, activated in B)."""

    name: str
    counts: Account
    paper: tuple[float, float] | None


def inspect(
    model_or_preset: Any, height: int = 1024, width: int = 1024, text_tokens: int = 512
) -> Inspection:
    """Counts a preset, a folder or single file (only its configuration is read) or a model."""
    source, name = model_or_preset, str(model_or_preset)
    if isinstance(source, (str, Path)):
        known = name.removeprefix("hyper-")
        if known in DENSE or known in PRESETS:
            source = DENSE.get(known) or name
        else:
            source = _meta_model(name)
            known = ""
    else:
        name, known = type(source).__name__, ""
    counts = account(source, height=height, width=width, text_tokens=text_tokens)
    same_size = (height, width, text_tokens) == (1024, 1024, 512)
    return Inspection(name, counts, PAPER.get(known) if same_size else None)


def _meta_model(path: str) -> Any:
    """The model of a folder or hub id on the meta device: no weights are read."""
    import torch
    from diffusers import FluxTransformer2DModel

    from d2m_models.flux import FluxMoETransformer2DModel

    folder = Path(path).expanduser()
    if not folder.exists() and not may_be_hub_name(path):
        names = sorted([*DENSE, *PRESETS])
        raise ValueError(f"{path!r} is neither a folder nor a preset; presets are {names}")
    if folder.is_file():
        from d2m_models.checkpoints.single_file import meta_model
        from d2m_models.checkpoints.source import open_source

        return meta_model(open_source(folder))
    subfolder = "transformer" if (folder / "model_index.json").is_file() else None
    try:
        config = FluxTransformer2DModel.load_config(path, subfolder=subfolder)
    except Exception as error:  # no folder, no such file, no hub: the loader raises many kinds
        raise ValueError(
            f"cannot read {folder / (subfolder or '') / 'config.json'}: "
            f"{' '.join(str(error).split())}"
        ) from error
    kind = config.get("_class_name")
    classes = {c.__name__: c for c in (FluxTransformer2DModel, FluxMoETransformer2DModel)}
    if kind not in classes:
        raise ValueError(f"{path} holds the class {kind}; expected one of {sorted(classes)}")
    with torch.device("meta"):
        return classes[kind].from_config(config)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text under a header, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for n, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if n == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def module_table(found: Inspection) -> str:
    """One row a kind of module, then the sum, and the paper's figures if there are some."""
    c = found.counts
    big, p_unit = _unit(c.total_params, {"M": 1e8, "K": 1e5, "": 0})
    wide, f_unit = _unit(c.flops, {"T": 1e11, "G": 1e8, "M": 0})
    columns = ("held", "activated", "paper's count")
    header = ("", *(f"{name} {p_unit}".rstrip() for name in columns))
    header += (f"{f_unit}FLOP", f"{f_unit}FLOP, attn half")
    rows: list[Sequence[str]] = [header]

    def row(label: str, held, activated, by_paper, flops, half) -> tuple[str, ...]:
        params = [f"{v / big:,.1f}" for v in (held, activated, by_paper)]
        return (label, *params, f"{flops / wide:.3f}", f"{half / wide:.3f}")

    for part, count in c.parts.items():
        if count.total:
            whole = count.flops + count.attention_flops
            half = whole - count.attention_flops / 2
            values = (count.total, count.activated, count.activated_paper, whole, half)
            rows.append(row(LABELS[part], *values))
    values = (c.total_params, c.activated_params, c.activated_params_paper)
    rows.append(row("all", *values, c.flops, c.flops_half_attention))
    if found.paper is not None:
        flops, params = found.paper
        rows.append(("the paper", "", "", f"{1000 * params:,.1f}", "", f"{flops:.2f}"))
    return text_table(rows)


def _unit(value: float, least: Mapping[str, float]) -> tuple[float, str]:
    """The divisor and letter for values of this size: the first whose least it reaches."""
    letter = next(letter for letter, low in least.items() if value >= low)
    return {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0}[letter], letter


def family_table(found: Sequence[Inspection]) -> str:
    """One row a model, beside the paper's columns."""
    rows = [
        ("", "held B", "activated B", "paper's count B", "paper B", "TFLOP", "attn half", "paper T")
    ]
    for one in found:
        c, paper = one.counts, one.paper
        params = (c.total_params, c.activated_params, c.activated_params_paper)
        cells = [f"{value / 1e9:.3f}" for value in params]
        cells.append(f"{paper[1]:.2f}" if paper else "")
        cells += [f"{c.flops / 1e12:.2f}", f"{c.flops_half_attention / 1e12:.2f}"]
        rows.append((one.name, *cells, f"{paper[0]:.2f}" if paper else ""))
    return text_table(rows)


def draw(found: Sequence[Inspection], path: str | Path) -> Path:
    """Activated parameters by module, by the paper's way of counting, one bar a model (Fig. 2)."""
    from d2m_models.inspection.figures import stacked_bars

    rows: dict[str, Mapping[str, float]] = {
        one.name: {
            LABELS[part]: count.activated_paper / 1e9 for part, count in one.counts.parts.items()
        }
        for one in found
    }
    marks = {one.name: one.paper[1] for one in found if one.paper is not None}
    return stacked_bars(
        path, rows, "activated parameters, 1e9 (the paper's way of counting)", marks
    )
