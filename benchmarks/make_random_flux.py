"""Writes a FLUX.1 [dev] sized transformer with random weights (11.9 B parameters, 24 GB in bf16).

    python benchmarks/make_random_flux.py flux-random  # 24 GB, about two minutes
    python benchmarks/make_random_flux.py small --layers 2 4  # 3 GB: 2 double and 4 single blocks

For trying `d2m convert` and `d2m inspect` at full size without the licensed weights. Needs little
memory: every tensor is drawn, written and forgotten.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from tqdm import tqdm

from d2m_models.checkpoints.tensor_files import (
    TensorSpec,
    file_names,
    pack,
    write_file,
    write_index,
)
from d2m_models.files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--layers", type=int, nargs=2, default=(19, 38), metavar=("DOUBLE", "SINGLE")
    )
    parser.add_argument("--schnell", action="store_true", help="no guidance embedding")
    parser.add_argument("--shard-gb", type=float, default=9.98, help="as FLUX.1 [dev] has them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=args.layers[0],
            num_single_layers=args.layers[1],
            guidance_embeds=not args.schnell,
        )
    specs = [
        TensorSpec(name, torch.bfloat16, tuple(value.shape))
        for name, value in model.state_dict().items()
    ]
    need = sum(spec.nbytes for spec in specs)
    args.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    if free < need:
        raise SystemExit(f"{args.folder} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed")
    generator = torch.Generator().manual_seed(args.seed)
    files = pack(specs, int(args.shard_gb * 1e9))
    names = file_names(len(files))
    with tqdm(total=need, unit="B", unit_scale=True) as bar:

        def draw(specs):
            for spec in specs:
                tensor = torch.empty(spec.shape, dtype=torch.bfloat16)
                if len(spec.shape) == 2:  # a Linear's usual scale, so that activations stay finite
                    tensor.normal_(std=0.5 * spec.shape[1] ** -0.5, generator=generator)
                elif "norm_" in spec.name:
                    tensor.fill_(1)
                else:
                    tensor.normal_(std=0.02, generator=generator)
                bar.update(spec.nbytes)
                yield tensor

        for name, part in zip(names, files, strict=True):
            write_atomic(args.folder / name, lambda tmp, p=part: write_file(tmp, p, draw(p)))
    write_index(args.folder, dict(zip(names, files, strict=True)))
    config = {"_class_name": "FluxTransformer2DModel", **model.config}
    config = {k: v for k, v in config.items() if k != "_use_default_values"}
    (args.folder / "config.json").write_text(json.dumps(config, indent=2, default=list) + "\n")


if __name__ == "__main__":
    main()
