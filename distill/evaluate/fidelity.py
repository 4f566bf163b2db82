"""How near a student's images are to its teacher's from the same noise and prompts.

PSNR and SSIM compare pixels, the relative MSE latents on the way, LPIPS and the cosine features of
each pair; CMMD and FID compare the two sets. Everything takes arrays and tensors, so the demo's
report uses the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.errors import UserError
from distill.evaluate.generate import latents_path
from distill.evaluate.judges import Item, Judges, batches

HIGHEST_PSNR = 100.0  # dB, of equal images: no infinity in a mean or in JSON


def psnr(image: np.ndarray, teacher: np.ndarray) -> float:
    """10 log10(1 / MSE) in dB of images [H, W] or [H, W, 3] in 0..1, at most `HIGHEST_PSNR`."""
    mse = float(np.square(np.float64(image) - teacher).mean())
    return min(HIGHEST_PSNR, -10 * math.log10(max(mse, 1e-30)))


def ssim(image: np.ndarray, teacher: np.ndarray) -> float:
    """Structural similarity as Wang et al. (2004): Gaussian window of 11 x 11, sigma 1.5; images
    narrower than that take scikit-image's uniform window of 7."""
    from skimage.metrics import structural_similarity

    axis = -1 if image.ndim == 3 else None
    window = {} if min(image.shape[:2]) < 11 else {
        "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False
    }  # fmt: skip
    return float(structural_similarity(np.float64(image), np.float64(teacher), data_range=1,
                                       channel_axis=axis, **window))  # fmt: skip


def pixels(images: Tensor, teacher: Tensor) -> dict[str, float]:
    """Mean PSNR and SSIM of images [n, H, W] or [n, H, W, 3] in 0..1 to the teacher's."""
    pairs = list(zip(images.numpy(), teacher.numpy(), strict=True))
    measures = {"psnr": psnr, "ssim": ssim}
    return {name: float(np.mean([f(*pair) for pair in pairs])) for name, f in measures.items()}


def latent_mse(latents: Tensor, teacher: Tensor) -> list[float]:
    """||x - teacher||^2 / ||teacher||^2 at every moment of latents [moments, ...]."""
    ours, theirs = latents.double().flatten(1), teacher.double().flatten(1)
    return ((ours - theirs).square().sum(1) / theirs.square().sum(1)).tolist()


def cmmd(features: Tensor, teacher: Tensor) -> float:
    """1000 x squared MMD of unit features [n, d], kernel exp(-|x - y|^2 / (2 10^2)).

    Jayasumana et al. (2024), whose features are CLIP ViT-L/14-336's.
    """
    x, y = (torch.nn.functional.normalize(f.double(), dim=1) for f in (features, teacher))

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        rows = [torch.exp((part @ b.T - 1) / 100).mean() for part in a.split(1024)]
        return sum(float(r) * len(p) for r, p in zip(rows, a.split(1024), strict=True)) / len(a)

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def fid(features: Tensor, teacher: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of features [n, d], n >= 2 (Heusel et al. 2017).

    The features are those of the judge given, not Inception's, so FID here compares with FID here.
    """
    x, y = features.double(), teacher.double()
    s1, s2 = (torch.atleast_2d(torch.cov(f.T)) for f in (x, y))
    roots = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * roots)


def score(items: Sequence[Item], judges: Judges) -> dict[str, dict[str, Any]]:
    """Columns by image: psnr, ssim, latent_mse (the mean over moments) and latent_mse_end; with
    judges lpips, cosine, and "features", from which `sets` makes CMMD and FID."""
    if any(item.other is None for item in items):
        raise UserError("fidelity compares with a teacher; give it with --against")
    columns: dict[str, dict[str, Any]] = {}

    def put(column: str, item: Item, value: Any) -> None:
        columns.setdefault(column, {})[item.key] = value

    lpips = judges.open("lpips", _lpips)
    clip = judges.open("features", judges.clip)
    for part in batches(items, 8):
        ours, theirs = [i.open() for i in part], [i.open(i.other) for i in part]
        for item, image, other in zip(part, ours, theirs, strict=True):
            if image.size != other.size:
                raise UserError(f"{item.key}: {image.size} pixels, the teacher's {other.size}")
            a, b = (np.asarray(i, dtype=np.float64) / 255 for i in (image, other))
            put("psnr", item, psnr(a, b))
            put("ssim", item, ssim(a, b))
            if lpips is not None:
                put("lpips", item, lpips(a, b))
            paths = [latents_path(folder, item.key) for folder in (item.folder, item.other)]
            if all(path.exists() for path in paths):
                x, y = (_load(path) for path in paths)
                if x.shape == y.shape:
                    moments = latent_mse(x, y)
                    put("latent_mse", item, float(np.mean(moments)))
                    put("latent_mse_end", item, moments[-1])
        if clip is not None:
            x, y = clip.images(ours), clip.images(theirs)
            for item, a, b in zip(part, x, y, strict=True):
                put("cosine", item, float(torch.cosine_similarity(a, b, dim=0)))
                put("features", item, (a.numpy(), b.numpy()))
    return columns


def sets(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """CMMD and FID of all images' features; they have no value per image."""
    x, y = (torch.from_numpy(np.stack(side)) for side in zip(*pairs.values(), strict=True))
    return {"cmmd": cmmd(x, y)} | ({"fid": fid(x, y)} if len(x) > 1 else {})


def _load(path: Any) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["latents"]


def _lpips(name: str) -> Any:
    """LPIPS of torchmetrics, whose backbone torchvision must find."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    net = LearnedPerceptualImagePatchSimilarity(net_type=name, normalize=True)

    def distance(image: np.ndarray, teacher: np.ndarray) -> float:
        a, b = (torch.from_numpy(i).float().permute(2, 0, 1)[None] for i in (image, teacher))
        return float(net(a, b))

    return distance
