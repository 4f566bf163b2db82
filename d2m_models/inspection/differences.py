"""`d2m diff`: where a student departs from its teacher, block by block.

Shapes: B samples, I image tokens, X text tokens, D width.

    own     = ||S(x) - T(x)|| / ||T(x) - x||     the student's block on the teacher's input x
    output  = ||s - t|| / ||t||                  the tokens after it, each model on its own way

The first says which block is at fault, the second what has become of the error by then.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_models.blocks import BlockContext
from d2m_models.checkpoints.load import load_model
from d2m_models.checkpoints.source import check_dtypes, open_source
from d2m_models.config import KINDS, group_names
from d2m_models.flux import FluxMoETransformer2DModel
from d2m_models.inspection.table import text_table
from d2m_models.output import block_features, watched
from d2m_models.topk import set_top_k

# what a student has as its teacher has it
SIZES = (
    "num_attention_heads", "attention_head_dim", "in_channels", "joint_attention_dim",
    "pooled_projection_dim", "guidance_embeds",
)  # fmt: skip


@dataclass(frozen=True)
class BlockError:
    """Relative errors of one block; `output` is None inside a MoB group but for its last block."""

    own_image: float
    own_text: float
    output_image: float | None
    output_text: float | None

    @property
    def worst(self) -> float:
        return max(self.own_image, self.own_text)


def relative_error(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """||found - expected|| / ||scale or expected|| in fp32; 0 where both are 0."""
    error = (found.float() - expected.float()).norm()
    size = (expected if scale is None else scale).float().norm()
    return float(error / size) if float(size) > 0 else float(error)


def is_converted(model: nn.Module) -> bool:
    """Whether anything of a dense FLUX has been replaced."""
    config = getattr(model, "d2m_config", None)
    return config is not None and (config.moe, config.mob, config.adaln_dim) != (None,) * 3


@torch.no_grad()
def diff(
    teacher: FluxTransformer2DModel, student: FluxMoETransformer2DModel, **inputs: Any
) -> dict[str, BlockError]:
    """Relative errors of the student's blocks by name, worst `own` error first.

    Args:
        teacher, student: a dense FLUX and a conversion of it, on one device.
        inputs: the forward's arguments; a few calibration samples.
    """
    for kind in KINDS.values():
        counts = [len(getattr(model, kind)) for model in (teacher, student)]
        if counts[0] != counts[1]:
            raise ValueError(f"teacher has {counts[0]} {kind}, student {counts[1]}")
    for name in SIZES:
        values = [model.config[name] for model in (teacher, student)]
        if values[0] != values[1]:
            raise ValueError(
                f"the teacher's {name} is {values[0]}, the student's {values[1]}; expected a "
                "student that was made of this teacher"
            )
    keys = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
    seen: dict[str, tuple] = {}

    def record(name, kwargs, _output):
        seen[name] = tuple(kwargs[key] for key in keys)

    with watched(teacher, record), block_features(teacher, student.d2m_config) as wanted:
        teacher(**inputs)
    features = student(**inputs, output_aux=True).aux.features
    last_of = {names[-1]: group for group, names in group_names(student.d2m_config).items()}
    errors = {}
    for name, (x, c, temb, rotary) in seen.items():
        condition = temb
        if student.d2m_config.adaln_dim is not None:
            condition = student.adaln_down(F.silu(temb))
        context = BlockContext(condition, rotary, {}, None)
        x_own, c_own = student._run_block(name, x, c, context, None)
        x_out, c_out = wanted[name]
        feature = features.get(last_of.get(name, name))
        errors[name] = BlockError(
            relative_error(x_own, x_out, x_out - x),
            relative_error(c_own, c_out, c_out - c),
            None if feature is None else relative_error(feature[0], x_out),
            None if feature is None else relative_error(feature[1], c_out),
        )
    return dict(sorted(errors.items(), key=lambda item: -item[1].worst))


def random_inputs(
    model: nn.Module, batch: int = 4, image_tokens: int = 64, text_tokens: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of a FLUX forward: normal latents and text, spread timesteps, a square image."""
    side = round(image_tokens**0.5)
    if batch < 1 or text_tokens < 1 or image_tokens < 1 or side * side != image_tokens:
        raise ValueError(
            f"batch and text_tokens must be at least 1 and image_tokens a square, got {batch}, "
            f"{text_tokens}, {image_tokens}"
        )
    g = torch.Generator().manual_seed(seed)
    config, parameter = model.config, next(model.parameters())
    ids = torch.cartesian_prod(torch.zeros(1), *2 * [torch.arange(side, dtype=torch.float32)])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(parameter.device, parameter.dtype)

    inputs = {
        "hidden_states": normal(batch, image_tokens, config.in_channels),
        "encoder_hidden_states": normal(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
        "timestep": ((torch.arange(batch) + 0.5) / batch).to(parameter.device, parameter.dtype),
        "img_ids": ids.to(parameter.device),
        "txt_ids": torch.zeros(text_tokens, 3, device=parameter.device),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full_like(inputs["timestep"], 3.5)
    return inputs


def diff_checkpoints(
    teacher: str, student: str, inputs: str | None = None, top_k: Any = None, **random: Any
) -> dict[str, BlockError]:
    """`diff` of two folders; inputs from a safetensors file, or `random_inputs(**random)`."""
    from safetensors.torch import load_file

    models = []
    for path in (teacher, student):
        source = open_source(path)
        models.append(load_model(source.folder, check_dtypes(source, None)))
    converted = [is_converted(model) for model in models]
    if converted == [True, False]:
        raise ValueError(
            f"{teacher} is converted and {student} is dense; expected the dense teacher first, "
            "then the student"
        )
    if converted[0]:
        raise ValueError(f"{teacher} is converted; expected a dense teacher")
    if not isinstance(models[1], FluxMoETransformer2DModel):
        raise ValueError(f"{student} holds a dense model; expected a converted one")
    if top_k is not None:
        set_top_k(models[1], top_k)
    if inputs is None:
        return diff(*models, **random_inputs(models[0], **random))
    if not Path(inputs).is_file():
        raise ValueError(f"{inputs} does not exist; expected a safetensors file of inputs")
    return diff(*models, **load_file(inputs))


def diff_table(errors: dict[str, BlockError]) -> str:
    """Worst block first."""
    rows = [("block", "own image", "own text", "image after", "text after")]
    for name, error in errors.items():
        rows.append((name, *("" if v is None else f"{v:.3e}" for v in astuple(error))))
    return text_table(rows)


def draw_diff(errors: dict[str, BlockError], path: str | Path) -> Path:
    """Own errors in the model's order."""
    from d2m_models.inspection.figures import dots

    def place(name: str) -> tuple[bool, int]:
        kind, index = name.split(".")
        return kind == KINDS["single"], int(index)

    values = {}
    for name in sorted(errors, key=place):
        short = f"{'S' if name.startswith('single') else 'D'}{name.split('.')[1]}"
        values[f"{short} image"] = errors[name].own_image
        values[f"{short} text"] = errors[name].own_text
    return dots(path, values, "error relative to the block's update")
