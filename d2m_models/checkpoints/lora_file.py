"""A LoRA fused into the dense teacher, tensor by tensor, before conversion (HyperFLUX).

Shapes: N x K weight of a Linear, r rank.

    W' = W + scale * s * B A,    s = alpha / r (1 where the file gives no alpha), B [N, r], A [r, K]
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

_PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "b_bias",
    ".lora.down.weight": "a", ".lora.up.weight": "b",
}  # fmt: skip


@dataclass
class LoRAFile:
    """The weight changes of one LoRA file, by parameter name of the dense FLUX.

    Args:
        deltas: Linear name -> {"a": [r, K], "b": [N, r], "b_bias": [N]}, "a" and "b" always there.
        scales: Linear name -> scale * alpha / r.
        digest: hash of file and scale, which tells one fused teacher from another.
    """

    deltas: dict[str, dict[str, Tensor]]
    scales: dict[str, float]
    digest: str

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter `name` with its change added in fp32, in its own dtype."""
        linear, _, part = name.rpartition(".")
        delta = self.deltas.get(linear)
        if delta is None or (part == "bias" and "b_bias" not in delta):
            return tensor
        if part == "bias":
            change = delta["b_bias"].float()
        else:
            change = delta["b"].float() @ delta["a"].float()
        return tensor.float().add_(change, alpha=self.scales[linear]).to(tensor.dtype)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises unless every change has a parameter of its shape."""
        for linear, delta in self.deltas.items():
            shape = shapes.get(f"{linear}.weight")
            if shape is None:
                raise ValueError(f"the LoRA changes {linear}, which the model does not have")
            own = (delta["b"].shape[0], delta["a"].shape[1])
            if own != tuple(shape) or delta["b"].shape[1] != delta["a"].shape[0]:
                raise ValueError(
                    f"the LoRA's change of {linear} is {list(own)}, the weight {list(shape)}; it "
                    f"was made for another model"
                )
            if "b_bias" in delta and f"{linear}.bias" not in shapes:
                raise ValueError(f"the LoRA changes the bias of {linear}, which has none")


def read_lora(path: str | Path, scale: float = 1.0) -> LoRAFile:
    """A FLUX LoRA in any format diffusers reads (its own, peft, kohya, XLabs, fal), e.g. Hyper-SD.

    Args:
        path: a safetensors file. scale: what `pipe.fuse_lora(lora_scale=...)` would be given.
    """
    from diffusers.loaders import FluxLoraLoaderMixin

    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"the LoRA file {path} does not exist")
    if path.suffix != ".safetensors":  # whatever else it is, diffusers would unpickle it
        raise ValueError(f"the LoRA file {path} is no .safetensors file; expected one")
    if not math.isfinite(scale):
        raise ValueError(f"lora_scale must be finite, got {scale}")
    try:
        state, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            return_alphas=True,
            return_lora_metadata=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise ValueError(f"cannot read the LoRA {path}: {' '.join(str(error).split())}") from error
    deltas: dict[str, dict[str, Tensor]] = {}
    ignored, unknown = [], []
    for key, value in state.items():
        if key.startswith(("text_encoder.", "text_encoder_2.")):
            ignored.append(key)
            continue
        name = key.removeprefix("transformer.")
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is None:
            unknown.append(key)
        else:
            deltas.setdefault(name.removesuffix(part), {})[_PARTS[part]] = value
    incomplete = [name for name, delta in deltas.items() if not {"a", "b"} <= set(delta)]
    if unknown or incomplete or not deltas:
        what = f"it has keys that are no LoRA of a Linear: {unknown[:3]}" if unknown else (
            f"A or B is missing for {incomplete[:3]}" if incomplete else "it changes no transformer"
        )  # fmt: skip
        raise ValueError(f"cannot fuse the LoRA {path}: {what}")
    if ignored:
        logger.warning("the LoRA's %d text encoder tensors are left out", len(ignored))
    scales = {
        name: scale * _alpha_over_rank(name, delta["a"].shape[0], alphas or {}, metadata or {})
        for name, delta in deltas.items()
    }
    digest = hashlib.sha256(repr(float(scale)).encode())
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 22), b""):
            digest.update(chunk)
    return LoRAFile(deltas, scales, digest.hexdigest()[:16])


def _alpha_over_rank(name: str, rank: int, alphas: dict[str, Any], metadata: dict) -> float:
    """s: from the file's alpha tensors, else from peft's metadata, else 1."""
    for key in (f"transformer.{name}.alpha", f"{name}.alpha"):
        if key in alphas:
            return float(alphas[key]) / rank
    own = {k.removeprefix("transformer."): v for k, v in metadata.items()}
    if own.get("use_dora"):
        raise ValueError("a DoRA is no plain weight delta and cannot be fused here")
    alpha = own.get("lora_alpha", rank)
    for key, value in (own.get("alpha_pattern") or {}).items():
        if name == key or name.endswith(f".{key}"):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


def fuse_lora(model, lora: LoRAFile) -> Any:
    """Adds the LoRA to a loaded dense FLUX, in place; returns it."""
    parameters = dict(model.named_parameters())
    lora.check({name: tuple(p.shape) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        changed = lora.apply(name, parameter.data.cpu())
        parameter.data.copy_(changed)
    return model
