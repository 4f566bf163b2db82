"""AdaLN compression: the conditioning silu(temb), D wide, is described by A numbers.

Shapes: D width, A compressed width, n calibration samples, N outputs of one AdaLN Linear.

    c = V (s - mean),  s = silu(temb)          one down-projection for the whole model
    W s + b  ~=  (W V^T) c + (W mean + b)      per AdaLN Linear; V [A, D] has orthonormal rows

V holds the principal directions of s on calibration data. Centring costs nothing, since the
per-block bias absorbs the mean, and with A = D the result is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_kernels.onednn import fast_bf16
from d2m_models.config import named_blocks


@dataclass(frozen=True)
class AdaLNBasis:
    """mean [D] and directions [A, D], fp64 on the CPU; `explained` is the variance they keep."""

    mean: Tensor
    directions: Tensor
    explained: float

    @classmethod
    def from_samples(cls, temb_nD: Tensor, dim: int) -> AdaLNBasis:
        """Principal directions of silu(temb).

        Args:
            temb_nD: n samples of the time-text embedding, before silu.
            dim: A, 1..D. Where A exceeds the rank of the samples, orthonormal directions fill up.
        """
        check_samples(temb_nD)
        if not 1 <= dim <= temb_nD.shape[1]:
            raise ValueError(
                f"adaln_dim must be in 1..{temb_nD.shape[1]} (the model width), got {dim}"
            )
        s_nD = F.silu(temb_nD.detach().to("cpu", torch.float64))
        if not torch.isfinite(s_nD).all():
            raise ValueError("adaln_calibration has values that are NaN or infinite")
        mean_D = s_nD.mean(0)
        centred_nD = s_nD - mean_D
        if dim < len(centred_nD) < centred_nD.shape[1]:
            directions_AD = _directions_from_gram(centred_nD, dim)
        else:
            # eigh of the covariance gives D orthonormal directions even from fewer than D samples.
            _, vectors_DD = torch.linalg.eigh(centred_nD.t() @ centred_nD)
            directions_AD = vectors_DD.flip(1)[:, :dim].t().contiguous()
        total = centred_nD.square().sum()
        kept = (centred_nD @ directions_AD.t()).square().sum()
        explained = 1.0 if total == 0 else min(1.0, float(kept / total))
        return cls(mean_D, directions_AD, explained)

    def down_projection(self) -> tuple[Tensor, Tensor]:
        """Weight [A, D] and bias [A] of c = V s - V mean."""
        return self.directions, -(self.directions @ self.mean)

    def compress(self, weight_ND: Tensor, bias_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight [N, A] and bias [N] that act on c as the given ones act on s, in their dtype."""
        return self.compress_measured(weight_ND, bias_N)[:2]

    def compress_measured(
        self, weight_ND: Tensor, bias_N: Tensor | None, temb_nD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, float | None]:
        """`compress` and `relative_error` in one product, which reads the weight once."""
        coarse_D = self.mean.bfloat16().double()  # in two parts, so that bf16 products keep it
        rows = [self.directions, torch.stack([coarse_D, self.mean - coarse_D])]
        if temb_nD is not None:
            s_nD = F.silu(temb_nD.detach().to("cpu", torch.float64))
            centred_nD = s_nD - self.mean
            rows += [s_nD, centred_nD - centred_nD @ self.directions.t() @ self.directions]
        new_NA, shift_N2, *outputs = _products(weight_ND, *rows)
        bias = torch.zeros(()) if bias_N is None else bias_N.detach().cpu()
        new_bias_N = shift_N2.sum(1) + bias.to(shift_N2)
        error = None
        if temb_nD is not None:
            exact_Nn, error_Nn = outputs
            exact_Nn = exact_Nn + bias.to(exact_Nn).reshape(-1, 1)
            error = float(error_Nn.norm() / exact_Nn.norm().clamp(min=1e-30))
        at = {"device": weight_ND.device, "dtype": weight_ND.dtype}
        return new_NA.to(**at), new_bias_N.to(**at), error

    def relative_error(self, temb_nD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> float:
        """||compressed - exact|| / ||exact|| of one AdaLN Linear's output over the samples."""
        return self.compress_measured(weight_ND, bias_N, temb_nD)[2]


def check_samples(temb_nD: Tensor, dim: int | None = None) -> None:
    """Raises unless these are samples [n >= 2, D] of temb, of a model of width `dim` if given."""
    found = tuple(temb_nD.shape) if isinstance(temb_nD, Tensor) else type(temb_nD).__name__
    if isinstance(found, str) or len(found) != 2 or found[0] < 2 or dim not in (None, found[1]):
        width = "D" if dim is None else f"D={dim}"
        raise ValueError(f"adaln_calibration must be temb samples [n >= 2, {width}], got {found}")


def _products(weight_ND: Tensor, *rows_kD: Tensor) -> list[Tensor]:
    """weight @ rows^T for each, [N, k]: in fp64, and for half precision weights in fp32.

    bf16 weights are multiplied in bf16 where the CPU can, six times as fast; the directions are
    then rounded as they are in the model.
    """
    weight_ND = weight_ND.detach().cpu()
    exact = torch.float32 if weight_ND.dtype.itemsize == 2 else torch.float64
    fast = weight_ND.dtype == torch.bfloat16 and fast_bf16()
    at = weight_ND.dtype if fast else exact
    all_Nk = weight_ND.to(at) @ torch.cat(rows_kD).to(at).t()
    return list(all_Nk.to(exact).split([len(rows) for rows in rows_kD], dim=1))


def _directions_from_gram(centred_nD: Tensor, dim: int) -> Tensor:
    """The first principal directions from n < D samples, through the small matrix [n, n].

    Full size, n = 1024 and D = 3072, this takes 2 s in place of 40. Directions of almost no
    variance come out inexact; QR makes them orthonormal again.
    """
    variance_n, vectors_nn = torch.linalg.eigh(centred_nD @ centred_nD.t())
    scaled = vectors_nn.flip(1)[:, :dim] / variance_n.flip(0)[:dim].clamp(min=1e-300).sqrt()
    q_DA, r_AA = torch.linalg.qr(centred_nD.t() @ scaled)
    sign_A = torch.where(r_AA.diagonal() < 0, -1.0, 1.0).to(q_DA)
    return (q_DA * sign_A).t().contiguous()


def adaln_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The AdaLN Linears of a FLUX model by name: norm1, norm1_context, norm and norm_out."""
    found = {}
    for name, block in named_blocks(model).items():
        for norm in ("norm",) if name.startswith("single") else ("norm1", "norm1_context"):
            found[f"{name}.{norm}.linear"] = getattr(block, norm).linear
    found["norm_out.linear"] = model.norm_out.linear
    return found


@torch.no_grad()
def sample_conditioning(model: nn.Module, samples: int = 1024, seed: int = 0) -> Tensor:
    """temb [n, D] of a FLUX model at spread timesteps, with random pooled text embeddings.

    A stand-in where no prompts are at hand: timesteps are uniform in (0, 1), guidance (if the model
    has it) uniform in 1..7, pooled projections standard normal. Real prompts calibrate better.
    """
    embed = model.time_text_embed
    param = next(embed.parameters())
    generator = torch.Generator().manual_seed(seed)
    at = {"device": param.device, "dtype": param.dtype}
    timestep = (torch.rand(samples, generator=generator) * 1000).to(**at)
    guidance = ((1 + 6 * torch.rand(samples, generator=generator)) * 1000).to(**at)
    pooled = torch.randn(samples, model.config.pooled_projection_dim, generator=generator).to(**at)
    if model.config.guidance_embeds:
        return embed(timestep, guidance, pooled)
    return embed(timestep, pooled)
