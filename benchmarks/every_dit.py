"""`convert` and `add_mob` on every transformer class of diffusers, small, with random weights.

python benchmarks/every_dit.py        # results/every_dit.json, about two minutes
python benchmarks/draw.py --pages     # the table in docs/models.md
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from helpers.small_dits import LEFT_OUT, SMALL, build, tensors  # noqa: E402

from d2m_models import MoEShare, add_mob, convert, convert_flux, set_top_k  # noqa: E402
from d2m_models.config import MoEConfig  # noqa: E402


def converted(name: str) -> tuple[nn.Module, dict, list[Tensor], dict]:
    """(model, inputs, the dense model's outputs, d2m_report) of a class, converted."""
    model, inputs = build(name)
    with torch.no_grad():
        dense = tensors(model(**inputs))
    if name == "FluxTransformer2DModel":
        model = convert_flux(model, MoEConfig())
        names = [n for n, m in model.named_modules() if hasattr(m, "neuron_order")]
        return model, inputs, dense, {"converted": names, "skipped": {}}
    try:
        convert(model, MoEShare())
    except ValueError:  # none can be converted: the reasons are in the report all the same
        pass
    return model, inputs, dense, model.d2m_report


def error(model: nn.Module, inputs: dict, dense: list[Tensor]) -> float:
    """The largest relative error of an output against the dense model's."""
    with torch.no_grad():
        found = tensors(model(**inputs))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, dense, strict=True))


def lists_of_blocks(model: nn.Module) -> list[str]:
    """Names of the lists of two or more blocks of one class, one after another in a model."""
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList)
        and len(m) > 1
        and len({type(block) for block in m}) == 1
        and all(sum(p.numel() for p in block.parameters()) > 16384 for block in m)
        and not any(part.isdigit() for part in name.split("."))
    ]


def mob(name: str) -> dict[str, str]:
    """{list of blocks: "" or why its first two cannot form a group}; of all lists."""
    found = {}
    for blocks in lists_of_blocks(build(name)[0]):
        model, inputs = build(name)
        try:
            add_mob(model, {blocks: [(0, 1)]}, inputs)
            found[blocks] = ""
        except ValueError as reason:
            found[blocks] = str(reason)
    return found


def measure(name: str) -> dict:
    """A class's row."""
    model, inputs, dense, report = converted(name)
    row = {"converted": len(report["converted"]), "skipped": report["skipped"]}
    if report["converted"]:
        set_top_k(model, "dense")
        row["error"] = error(model, inputs, dense)
    return {**row, "mob": mob(name)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "every_dit.json")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # what is skipped stands in the report
    rows = {name: measure(name) for name in sorted(SMALL)}
    found = {"diffusers": diffusers.__version__, "rows": rows, "left_out": LEFT_OUT}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
