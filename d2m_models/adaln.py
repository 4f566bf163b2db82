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
        if not isinstance(temb_nD, Tensor) or temb_nD.ndim != 2 or temb_nD.shape[0] < 2:
            found = tuple(temb_nD.shape) if isinstance(temb_nD, Tensor) else type(temb_nD).__name__
            raise ValueError(f"adaln_calibration must be temb samples [n >= 2, D], got {found}")
        if not 1 <= dim <= temb_nD.shape[1]:
            raise ValueError(
                f"adaln_dim must be in 1..{temb_nD.shape[1]} (the model width), got {dim}"
            )
        s_nD = F.silu(temb_nD.detach().to("cpu", torch.float64))
        if not torch.isfinite(s_nD).all():
            raise ValueError("adaln_calibration has values that are NaN or infinite")
        mean_D = s_nD.mean(0)
        centred_nD = s_nD - mean_D
        # eigh of the covariance gives D orthonormal directions even from fewer than D samples.
        variance_D, vectors_DD = torch.linalg.eigh(centred_nD.t() @ centred_nD)
        total = variance_D.clamp(min=0).sum()
        kept = variance_D[-dim:].clamp(min=0).sum()
        explained = 1.0 if total == 0 else float(kept / total)
        return cls(mean_D, vectors_DD.flip(1)[:, :dim].t().contiguous(), explained)

    def down_projection(self) -> tuple[Tensor, Tensor]:
        """Weight [A, D] and bias [A] of c = V s - V mean."""
        return self.directions, -(self.directions @ self.mean)

    def compress(self, weight_ND: Tensor, bias_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight [N, A] and bias [N] that act on c as the given ones act on s, in their dtype."""
        wide_ND = weight_ND.detach().to("cpu", torch.float64)
        new_bias_N = wide_ND @ self.mean
        if bias_N is not None:
            new_bias_N = new_bias_N + bias_N.detach().to("cpu", torch.float64)
        new_NA = wide_ND @ self.directions.t()
        at = {"device": weight_ND.device, "dtype": weight_ND.dtype}
        return new_NA.to(**at), new_bias_N.to(**at)

    def relative_error(self, temb_nD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> float:
        """||compressed - exact|| / ||exact|| of one AdaLN Linear's output over the samples."""
        s_nD = F.silu(temb_nD.detach().to("cpu", torch.float64))
        wide_ND = weight_ND.detach().to("cpu", torch.float64)
        exact_nN = s_nD @ wide_ND.t()
        if bias_N is not None:
            exact_nN = exact_nN + bias_N.detach().to("cpu", torch.float64)
        rest_nD = (s_nD - self.mean) - (s_nD - self.mean) @ self.directions.t() @ self.directions
        return float((rest_nD @ wide_ND.t()).norm() / exact_nN.norm().clamp(min=1e-300))


def adaln_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The AdaLN Linears of a FLUX model by name: norm1, norm1_context, norm and norm_out."""
    found = {}
    for i, block in enumerate(model.transformer_blocks):
        found[f"transformer_blocks.{i}.norm1.linear"] = block.norm1.linear
        found[f"transformer_blocks.{i}.norm1_context.linear"] = block.norm1_context.linear
    for i, block in enumerate(model.single_transformer_blocks):
        found[f"single_transformer_blocks.{i}.norm.linear"] = block.norm.linear
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
