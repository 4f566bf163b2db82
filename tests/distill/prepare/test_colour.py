"""Every mode Pillow can give, and colour profiles: pixels against a reference of their own."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image, ImageCms

from distill.prepare.buckets import resolutions
from distill.prepare.colour import MODES, PROFILE, to_srgb
from distill.prepare.decode import decode
from distill.prepare.item import Item

RED, WHITE = (255, 0, 0), (255, 255, 255)
HALF_RED = (255, 127, 127)  # at alpha 128 on white


def solid(mode, value):
    return Image.new(mode, (2, 2), value)


def palette(mode, index=1, **info):
    image = Image.new(mode, (2, 2), index)
    image.putpalette([0, 0, 0, *RED, 0, 0, 255])
    image.info |= info
    return image


def array(values, dtype):
    return Image.fromarray(np.full((2, 2), values, dtype))


# mode: images of one colour, and that colour in sRGB by the mode's own definition
REFERENCE = {
    "1": [(solid("1", 1), WHITE), (solid("1", 0), (0, 0, 0))],
    "L": [(solid("L", 77), (77, 77, 77))],
    "LA": [(solid("LA", (77, 255)), (77, 77, 77)), (solid("LA", (77, 0)), WHITE)],
    "La": [(solid("LA", (77, 255)).convert("La"), (77, 77, 77)), (solid("La", (0, 0)), WHITE)],
    "P": [(palette("P"), RED), (palette("P", transparency=1), WHITE)],
    "PA": [(palette("PA", (1, 255)), RED), (palette("PA", (1, 0)), WHITE)],
    "RGB": [(solid("RGB", (1, 2, 3)), (1, 2, 3))],
    "RGBA": [(solid("RGBA", (*RED, 128)), HALF_RED)],
    "RGBa": [(solid("RGBa", (128, 0, 0, 128)), HALF_RED)],
    "RGBX": [(solid("RGBX", (1, 2, 3, 99)), (1, 2, 3))],
    "CMYK": [(solid("CMYK", (0, 255, 255, 0)), RED), (solid("CMYK", (0, 0, 0, 128)), (127,) * 3)],
    "YCbCr": [(solid("YCbCr", (76, 85, 255)), (254, 0, 0))],  # JFIF: Y = 0.299 R
    "HSV": [(solid("HSV", (85, 255, 255)), (0, 255, 0))],
    # CIE L*a*b* of sRGB's red at D50: 54.29, 80.80, 69.89; L * 2.55, a and b + 128
    "LAB": [(solid("LAB", (138, 209, 198)), RED), (solid("LAB", (255, 128, 128)), WHITE)],
    "I;16": [(array(0x8000, "<u2"), (128,) * 3), (array(0xFFFF, "<u2"), WHITE)],
    "I;16L": [(solid("I;16L", 0x1234), (0x12,) * 3)],
    "I;16B": [(solid("I;16B", 0x1234), (0x12,) * 3)],
    "I;16N": [(solid("I;16N", 0x1234), (0x12,) * 3)],
    "I": [(array(200, "i4"), "32-bit integer pixels have no known white")],
    "F": [
        (array(0.5, "f4"), (128,) * 3),
        (array(1.0, "f4"), WHITE),
        (array(200.0, "f4"), "floating-point pixels from 200 to 200; expected 0 to 1"),
        (array(np.nan, "f4"), "floating-point pixels from nan"),
    ],
}


def test_the_table_has_every_mode_of_pillow():
    assert set(Image.MODES) <= set(REFERENCE) and set(REFERENCE) == set(MODES)


@pytest.mark.parametrize("mode", REFERENCE)
def test_a_mode_gives_its_colour_or_says_why_not(mode):
    for image, want in REFERENCE[mode]:
        assert image.mode == mode
        if isinstance(want, str):
            with pytest.raises(ValueError, match=want):
                to_srgb(image)
            continue
        rgb, warning = to_srgb(image)
        assert (rgb.mode, rgb.size, warning) == ("RGB", (2, 2), None)
        most = 5 if mode == "LAB" else 1  # a step of 1 in a or b is up to 4 in sRGB
        off = np.abs(np.asarray(rgb).astype(int) - want).max()
        assert off <= most, (mode, rgb.getpixel((0, 0)))


def _png(depth, kind, rows, clear):
    """A PNG of one row whose pixels of value `clear` are transparent (tRNS)."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"\0" + rows)
    parts = [(b"IHDR", head), (b"tRNS", clear), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)


@pytest.mark.parametrize(
    ("depth", "kind", "rows", "clear", "other"),
    [
        (1, 0, bytes([0b01000000]), struct.pack(">H", 0), WHITE),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), (170,) * 3),
        (4, 0, bytes([0x12]), struct.pack(">H", 1), (34,) * 3),
        (8, 0, bytes([1, 2]), struct.pack(">H", 1), (2,) * 3),
        (16, 0, struct.pack(">2H", 0x1234, 0x5600), struct.pack(">H", 0x1234), (0x56,) * 3),
        (8, 2, bytes([1, 2, 3, *RED]), struct.pack(">3H", 1, 2, 3), RED),
        (16, 2, struct.pack(">6H", 1, 512, 3, 65535, 0, 0), struct.pack(">3H", 1, 512, 3), RED),
    ],
)
def test_a_transparent_value_is_in_the_depth_of_the_file(depth, kind, rows, clear, other):
    rgb, _ = to_srgb(Image.open(io.BytesIO(_png(depth, kind, rows, clear))))
    assert rgb.getpixel((0, 0)) == WHITE and rgb.getpixel((1, 0)) == other


# --- profiles -------------------------------------------------------------------------------


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile():
    """sRGB with the red and the green primary swapped: the two tags trade their names."""
    data = bytearray(srgb_profile())
    (count,) = struct.unpack(">I", data[128:132])
    for at in range(132, 132 + 12 * count, 12):
        name = bytes(data[at : at + 4])
        data[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(data)


def _saved(image, kind, profile):
    data = io.BytesIO()
    image.save(data, kind, icc_profile=profile)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_followed(kind):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = io.BytesIO()
    solid("RGB", RED).save(data, kind, icc_profile=swapped_profile(), **lossless)
    rgb, warning = to_srgb(Image.open(data))
    assert (rgb.getpixel((0, 0)), warning) == ((0, 255, 0), None)


def test_transparency_and_palettes_keep_their_profile():
    for image, want in (
        (solid("RGBA", (*RED, 128)), (127, 255, 127)),
        (palette("P"), (0, 255, 0)),
        (solid("L", 77), (77, 77, 77)),  # a grey with a profile of colours
        (array(0x4D00, "<u2"), (77, 77, 77)),
    ):
        rgb, warning = to_srgb(Image.open(io.BytesIO(_saved(image, "PNG", swapped_profile()))))
        assert (rgb.getpixel((0, 0)), warning) == (want, None), image.mode


def test_srgb_s_own_profile_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    rgb, _ = to_srgb(Image.open(io.BytesIO(_saved(Image.fromarray(pixels), "PNG", srgb_profile()))))
    assert np.array_equal(np.asarray(rgb), pixels)


@pytest.mark.parametrize(
    ("mode", "color", "profile"),
    [("RGB", RED, b"none"), ("RGB", RED, srgb_profile()[:200]), ("CMYK", (0, 255, 255, 0), None)],
)
def test_a_profile_that_cannot_be_followed_is_a_warning(mode, color, profile):
    data = _saved(solid(mode, color).resize((64, 64)), "TIFF", profile or srgb_profile())
    done = decode(Item("a", lambda: (data, "a cat")), 0, resolutions(64), 2.0)
    assert done.error is None and done.warning == PROFILE
    assert np.array_equal(done.pixels, np.broadcast_to(np.uint8(RED)[:, None, None], (3, 64, 64)))
