"""Any image Pillow can give, upright and in sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

PROFILE = "its colour profile cannot be used, taken as sRGB"


def to_srgb(image: Any) -> tuple[Any, str | None]:
    """(a PIL image upright (EXIF), in sRGB, on white where it is transparent; a warning or None).

    An embedded ICC profile is followed. A mode or a range of values of which nobody can say what
    is white raises.
    """
    from PIL import Image, ImageOps

    # Before Pillow 10.3 a PNG of 16 bits had the mode of 32.
    mode = "I;16" if image.mode == "I" and image.format == "PNG" else image.mode
    if mode not in MODES:
        raise ValueError(f"images of mode {mode} are not read; expected one of {[*MODES]}")
    _scale_transparent_value(image)
    image = MODES[mode](ImageOps.exif_transpose(image))
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert(image.mode[:-1])
    image, warning = _without_profile(image, image.info.get("icc_profile"))
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image, warning


# --- modes ----------------------------------------------------------------------------------


def _scale_transparent_value(image: Any) -> None:
    """PNG gives the transparent value in the file's own depth, Pillow the pixels in 8 bits."""
    value, tile = image.info.get("transparency"), getattr(image, "tile", None)
    raw = tile[0][3] if tile else None
    if value is not None and raw in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[raw]
    elif value is not None and raw == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in value)


def _converted(opaque: str, clear: str) -> Callable[[Any], Any]:
    return lambda image: image.convert(clear if image.has_transparency_data else opaque)


def _same(image: Any) -> Any:
    return image


def _grey16(image: Any) -> Any:
    """The high byte, as Pillow's own readers take it from 16-bit colour."""
    values, clear = np.asarray(image), image.info.get("transparency")
    return _grey(image, values >> 8, None if clear is None else values != clear)


def _grey32(image: Any) -> Any:
    raise ValueError("32-bit integer pixels have no known white; expected 8 or 16 bits a channel")


def _float(image: Any) -> Any:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"floating-point pixels from {low:g} to {high:g}; expected 0 to 1")
    return _grey(image, np.rint(values * 255))


def _grey(image: Any, values: np.ndarray, opaque: np.ndarray | None = None) -> Any:
    """An L or LA image of values 0 to 255 that keeps the profile of `image`."""
    from PIL import Image

    grey = Image.fromarray(values.astype(np.uint8))
    if opaque is not None:
        grey = Image.merge("LA", (grey, Image.fromarray(opaque.astype(np.uint8) * 255)))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


# Every mode of Pillow: how it becomes L, LA, RGB, RGBA, CMYK or LAB, whose values have one meaning.
MODES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("1", "L", "LA", "La"), _converted("L", "LA")),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa"), _converted("RGB", "RGBA")),
    **dict.fromkeys(("RGBX", "YCbCr", "HSV"), _converted("RGB", "RGBA")),
    **dict.fromkeys(("CMYK", "LAB"), _same),
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), _grey16),
    "I": _grey32,
    "F": _float,
}


# --- profiles -------------------------------------------------------------------------------


def _without_profile(image: Any, profile: bytes | None) -> tuple[Any, str | None]:
    """An L, RGB, CMYK or LAB image in RGB, its profile followed; a warning if that cannot be."""
    from PIL import ImageCms

    warning = None
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode == "L" and own.profile.xcolor_space.strip() == "RGB":
                image = image.convert("RGB")
            return _transformed(image, own), None
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            warning = PROFILE
    if image.mode == "LAB":
        return _transformed(image, ImageCms.createProfile("LAB")), warning
    return image.convert("RGB"), warning


def _transformed(image: Any, profile: Any) -> Any:
    from PIL import ImageCms

    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
