"""What a streamed conversion reads beside the weights: neuron orders and AdaLN calibration.

Shapes: F neurons of an FFN, D width, n calibration samples.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from d2m_models.adaln import AdaLNBasis, check_samples, sample_conditioning
from d2m_models.checkpoints.tasks import DenseReader
from d2m_models.checkpoints.tensor_files import (
    StoredTensor,
    TensorSpec,
    read_header,
    write_file,
)
from d2m_models.conversion.flux import ffn_widths
from d2m_models.files import write_atomic
from d2m_models.partition import check_orders
from d2m_models.topk import moe_layers

logger = logging.getLogger(__name__)

START_PARTS = ("router", "w2", "b2")
BASIS = "adaln_basis.safetensors"
_ERROR_SAMPLES = 16  # an error over N >= 6144 outputs each, steady enough


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_orders(orders, student: nn.Module) -> tuple[dict[str, Tensor], dict[str, StoredTensor]]:
    """Checked neuron orders of the student's MoE layers ({} keeps the dense order), and what else
    the file or the folder of files has of a start: FFN.router [E, D], FFN.w2 [D, F] in the new
    order and FFN.b2 [D], which is added (`d2m_models.conversion.start`)."""
    stored: dict[str, StoredTensor] = {}
    if orders is None:
        if moe_layers(student):
            logger.warning(
                "no neuron order: neurons keep the dense order, which is a poor split for "
                "distillation (--calibrate DATA measures a good one)"
            )
        return {}, {}
    if not isinstance(orders, Mapping):
        path = Path(orders).expanduser()
        if not path.exists():
            raise ValueError(f"the neuron order file {path} does not exist")
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            stored |= read_header(file)
        ours = tuple(f".{part}" for part in START_PARTS)
        orders = {n: tensor.read() for n, tensor in stored.items() if not n.endswith(ours)}
        stored = {n: tensor for n, tensor in stored.items() if n.endswith(ours)}
    widths = ffn_widths(student)
    known = {name: widths[name] for name in moe_layers(student)}
    missing = [name for name in known if name not in orders]
    if missing:
        raise ValueError(f"neuron_order lacks {missing[:3]} ({len(missing)} of {len(known)} FFNs)")
    if not known:
        raise ValueError("neuron_order is given, but the configuration has no experts")
    refitted = any(name.endswith(".w2") for name in stored)
    return check_orders(orders, known, copies=refitted), stored


def load_calibration(samples, dim: int) -> Tensor | None:
    if samples is None or isinstance(samples, Tensor):
        temb_nD = samples
    else:
        path = Path(samples).expanduser()
        if not path.is_file():
            raise ValueError(f"the calibration file {path} does not exist")
        found = read_header(path)
        if "temb" not in found:
            raise ValueError(f"{path} has no tensor 'temb' [n, D={dim}], but {sorted(found)[:3]}")
        temb_nD = found["temb"].read()
    if temb_nD is not None:
        check_samples(temb_nD, dim)
    return temb_nD


class AdaLNCompression:
    """The compression of one conversion's AdaLN.

    Attributes:
        basis, samples: once `prepare` has fitted them, or read them where the job goes on.
        errors: AdaLN Linear -> relative error, of those that are compressed.
    """

    basis: AdaLNBasis
    samples: Tensor

    def __init__(
        self, reader: DenseReader, dense: nn.Module, temb_nD: Tensor | None, width: int, seed: int
    ):
        self.reader, self.dense, self.temb_nD = reader, dense, temb_nD
        self.width, self.seed = width, seed
        self.errors: dict[str, float] = {}
        self.origin = "random" if temb_nD is None else digest_of({"temb": temb_nD})

    def prepare(self, folder: Path) -> None:
        """Keeps the basis in a file: a resumed run must go on with the very same."""
        path = folder / BASIS
        if not path.is_file():
            temb_nD = self.temb_nD
            if temb_nD is None:
                logger.warning(
                    "no AdaLN calibration: random pooled embeddings stand in for prompts"
                )
                embed = self.dense.time_text_embed.to_empty(device="cpu")
                for name, parameter in embed.named_parameters():
                    parameter.data = self.reader.read(f"time_text_embed.{name}").float()
                temb_nD = sample_conditioning(self.dense, seed=self.seed)
            basis = AdaLNBasis.from_samples(temb_nD, self.width)
            chosen_nD = temb_nD[:: max(1, len(temb_nD) // _ERROR_SAMPLES)].float().cpu()
            tensors = {
                "mean": basis.mean, "directions": basis.directions, "samples": chosen_nD,
                "explained": torch.tensor([basis.explained], dtype=torch.float64),
            }  # fmt: skip
            tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
            specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
            write_atomic(path, lambda tmp: write_file(tmp, specs, tensors.values()))
        self.basis, self.samples = read_basis(path)

    def down_projection(self, _: list[Tensor]) -> list[Tensor]:
        return [t.to(self.reader.dtype) for t in self.basis.down_projection()]

    def compress(self, linear: str, tensors: list[Tensor]) -> list[Tensor]:
        weight, bias = map(self.reader.finish, parts(linear), tensors)
        *made, self.errors[linear] = self.basis.compress_measured(weight, bias, self.samples)
        return made


def parts(linear: str) -> tuple[str, str]:
    return f"{linear}.weight", f"{linear}.bias"


def read_basis(path: Path) -> tuple[AdaLNBasis, Tensor]:
    """The basis a conversion used, and the samples its errors were measured on."""
    stored = {name: tensor.read() for name, tensor in read_header(path).items()}
    basis = AdaLNBasis(stored["mean"], stored["directions"], float(stored["explained"]))
    return basis, stored["samples"]
