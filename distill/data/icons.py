"""Icons as a data source: glyphs of the fonts in QtAwesome's wheel, 32x32, their names as prompts.

A name is composed of words ("folder-swap-outline"), so what a word looks like is learned from many
icons, and combinations that no icon has can be asked for. Nothing is downloaded and no Qt is
needed: the fonts and their tables of names are read as files.

Shapes: B batch, S image tokens, C channels of a token, L text tokens, J text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from distill.data.batch import Batch, generator
from distill.data.digits import ClassPrompts, patchify
from distill.errors import UserError

# short name, the first word of every prompt -> the font's files in qtawesome/fonts; their licences
# are Apache 2.0 (Material Design Icons, Remix Icon), MIT (Phosphor) and OFL 1.1 (Font Awesome Free)
FONTS = {
    "mdi": "materialdesignicons6-webfont",
    "phosphor": "phosphor",
    "remix": "remixicon",
    "fa": "fontawesome6-solid-webfont",
}
SIDE, OVERSAMPLING = 32, 4
SHOWN = 48  # icons of a preview


class Icons(ClassPrompts):
    """Grey icons, black on white, as 64 image tokens of 16 channels (4x4 pixels).

    Prompts are the font and the words of the name. A word's embedding is a fixed code of it, as of
    a text encoder that has seen every word: words that training never met can be given, though not
    understood. An empty prompt is label -1.

    Args:
        split: "train"; "test": icons that are held out; "combinations": icons with a pair of words
            that no training icon has, though each of them occurs there.
        fonts: short names of those to use. words: icons with longer names are left out.
        dropout: share of the training samples that get the empty prompt.
    """

    splits = ("train", "test", "combinations")
    side, patch = SIDE, 4
    image_tokens, channels = (SIDE // 4) ** 2, 16
    text_tokens, text_dim, pooled_dim = 8, 128, 128

    def __init__(
        self,
        split: str = "train",
        timesteps: str = "uniform",
        timestep_grid: Sequence[float] | None = None,
        *,
        fonts: Sequence[str] = ("mdi",),
        words: int | None = None,
        dropout: float = 0.0,
    ):
        if split not in self.splits:
            raise ValueError(f"split is {split!r}; expected one of {self.splits}")
        unknown = sorted(set(fonts) - set(FONTS))
        if unknown or not fonts:
            raise UserError(f"fonts are {list(fonts)}; expected some of {list(FONTS)}")
        self._positions(split, timesteps, timestep_grid)
        self.dropout = dropout
        glyphs = [
            (font, name, code)
            for font in fonts
            for name, code in read_charmap(font)
            if words is None or name.count("-") < words
        ]
        belongs = split_names([(font, name) for font, name, _ in glyphs])
        kept = [g for g, own in zip(glyphs, belongs, strict=True) if own == split]
        self.names = [(font, *name.split("-")) for font, name, _ in kept]
        self.num_classes = len(kept)
        self.latents = patchify(render(tuple((font, code) for font, _, code in kept)), self.patch)
        self._embed(self.names)

    def _embed(self, names: Sequence[Sequence[str]]) -> None:
        """Keeps each prompt's words as numbers; the last row is the empty prompt."""
        words = {w: i for i, w in enumerate(dict.fromkeys(w for name in names for w in name), 1)}
        self.word_table = torch.stack([torch.zeros(self.text_dim), *map(word_code, words)])
        self.words = torch.zeros(len(names) + 1, self.text_tokens, dtype=torch.long)
        for i, name in enumerate(names):
            ids = [words[w] for w in name[: self.text_tokens]]
            self.words[i, : len(ids)] = torch.tensor(ids)
        self.places = torch.stack([word_code(f"place {i}") for i in range(self.text_tokens)])

    def __len__(self) -> int:
        return self.num_classes

    def prompts(self, labels: Tensor) -> dict[str, Tensor]:
        """Text [B, L, J]: each word's code and half the code of its place; pooled [B, J]: the sum
        of the words' codes, of about unit variance."""
        words = self.words[labels]
        there = (words > 0).float()[..., None]
        codes = self.word_table[words]
        pooled = codes.sum(1) / there.sum(1).clamp(min=1).sqrt()
        return {"text": codes + 0.5 * self.places * there, "pooled": pooled}

    def batch(
        self, seed: int, step: int, count: int, stream: str = "train", rows: slice | None = None
    ) -> Batch:
        """Batch number `step` of the run `seed`, or only `rows` of it; a function of its
        arguments."""
        idx = self.epochs(seed, step, count)
        gen = generator(seed, stream, step)
        noise = torch.randn(count, self.image_tokens, self.channels, generator=gen)
        t = self.times(count, gen)
        empty = torch.rand(count, generator=gen) < self.dropout
        labels = torch.where(empty, -1, idx)
        batch = self.gather(labels, self.latents[idx], noise, t)
        return batch if rows is None else batch[rows]

    def asked(self, prompts: Sequence[str], seed: int, count: int = 1) -> Batch:
        """Pure noise (t = 1) for `count` samples of each of these prompts; see `whole_prompt`."""
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__)
        own._embed([whole_prompt(p).split() for p in prompts])
        return own.noise_for(torch.arange(len(prompts)).repeat_interleave(count), seed)

    def noise_batch(self, seed: int, per_class: int) -> Batch:
        """Pure noise (t = 1) for `per_class` samples of icons evenly spread over all."""
        labels = torch.linspace(0, self.num_classes - 1, min(SHOWN, self.num_classes)).long()
        return self.noise_for(labels.repeat_interleave(per_class), seed)


def whole_prompt(words: str) -> str:
    """ "folder-star" -> "mdi folder star": Material Design Icons where no font is named."""
    own = words.replace("-", " ").lower().split()
    return " ".join(own if own and own[0] in FONTS else ["mdi", *own])


def word_code(word: str) -> Tensor:
    """128 signs +-1 that depend on the word alone, on every machine: the bits of its SHAKE-128."""
    digest = torch.frombuffer(
        bytearray(hashlib.shake_128(word.encode()).digest(Icons.text_dim // 8)), dtype=torch.uint8
    )
    bits = digest[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten().float() * 2 - 1


def _drawn(text: str, one_in: int) -> bool:
    """A choice that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % one_in == 0


def split_names(names: Sequence[tuple[str, str]]) -> list[str]:
    """Which split each (font, name) belongs to.

    One pair of words in 60 is held out in all fonts; of the other icons, one in 40. An icon with a
    held-out pair of which a word occurs nowhere else in training is left to "test".
    """
    words = [name.split("-") for _, name in names]
    apart = [any(_drawn(" ".join(sorted(p)), 60) for p in combinations(set(w), 2)) for w in words]
    test = [_drawn(f"{font} {name}", 40) for font, name in names]
    rest = zip(words, apart, test, strict=True)
    known = {word for own, a, t in rest if not (a or t) for word in own}
    return [
        ("combinations" if known.issuperset(own) else "test") if a else "test" if t else "train"
        for own, a, t in zip(words, apart, test, strict=True)
    ]


def _folder() -> Path:
    """Where QtAwesome keeps its fonts; the package itself, which wants Qt, is not imported."""
    spec = find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'qtawesome'", name="qtawesome")
    return Path(spec.submodule_search_locations[0]) / "fonts"


def _file(font: str, end: str) -> Path:
    found = sorted(_folder().glob(f"{FONTS[font]}{end}"))
    if not found:
        raise UserError(f"QtAwesome has no fonts/{FONTS[font]}{end}; install QtAwesome>=1.4")
    return found[-1]


def read_charmap(font: str) -> list[tuple[str, int]]:
    """(name, code point) of a font's icons, in the order of their names, one for each glyph."""
    table = json.loads(_file(font, "-charmap-*.json").read_text(encoding="utf-8"))
    found: dict[int, str] = {}
    for name in sorted(table):
        found.setdefault(int(table[name], 16), name)
    return sorted((name, code) for code, name in found.items())


@lru_cache(maxsize=4)
def render(glyphs: tuple[tuple[str, int], ...]) -> Tensor:
    """[N, 32, 32] in -1..1, white = 1: each glyph centred, drawn large and averaged down."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    large, fonts = SIDE * OVERSAMPLING, {}
    images = np.empty((len(glyphs), SIDE, SIDE), dtype=np.uint8)
    for i, (font, code) in enumerate(glyphs):
        if font not in fonts:
            size = round(large * 0.94)  # a margin, for glyphs that reach over their square
            fonts[font] = ImageFont.truetype(str(_file(font, "-[0-9]*.ttf")), size)
        page = Image.new("L", (large, large), 255)
        middle = (large / 2, large / 2)
        ImageDraw.Draw(page).text(middle, chr(code), font=fonts[font], fill=0, anchor="mm")
        images[i] = np.asarray(page.reduce(OVERSAMPLING))
    return torch.from_numpy(images).float() / 127.5 - 1
