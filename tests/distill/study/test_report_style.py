"""The reports' style sheet, checked without a browser: a browser drops what it cannot read."""

from __future__ import annotations

import re

import pytest

from distill.page import STYLE

PROPERTIES = set(
    "background border border-bottom border-collapse border-radius color color-scheme display font "
    "font-size font-variant-numeric font-weight gap grid-template-columns height margin max-width "
    "overflow-x padding text-align white-space width".split()
)
KEYWORDS = set(
    "auto block collapse dark grid left light max-content none normal nowrap right sans-serif "
    "solid system-ui tabular-nums".split()
)
SELECTOR = re.compile(r"(:root|(\.?[a-z][a-z0-9]*)(:first-child|:nth-child\(\d\))?)( [a-z]+)?")
LENGTH = re.compile(r"(\d*\.)?\d+(px|rem|fr|%)?(/(\d*\.)?\d+)?")
MEDIA = re.compile(
    r"@media \((?:prefers-color-scheme:dark|max-\s*width:40rem)\)\{((?:[^{}]*\{[^{}]*\})+)\s*\}"
)


def problems(style: str) -> list[str]:
    """What a browser would not understand."""
    rules = MEDIA.sub(r"\1", style)
    assert re.sub(r"[^{}]*\{[^{}]*\}", "", rules).strip() == "", "braces do not match"
    defined = set(re.findall(r"(--[a-z]+):", rules))
    found = []
    for selectors, body in re.findall(r"([^{}]*)\{([^{}]*)\}", rules):
        found += [s for s in selectors.split(",") if not SELECTOR.fullmatch(s.strip())]
        for declaration in filter(None, map(str.strip, body.split(";"))):
            name, _, value = declaration.partition(":")
            words = re.split(r"[\s,]+", value)
            if name.startswith("--"):
                fine = re.fullmatch(r"--[a-z]+", name) and re.fullmatch(r"#[0-9a-f]{3,6}", value)
            else:
                fine = name in PROPERTIES and all(
                    word in KEYWORDS
                    or LENGTH.fullmatch(word)
                    or re.fullmatch(r"#([0-9a-f]{3}){1,2}", word)
                    or (re.fullmatch(r"var\(--[a-z]+\)", word) and word[4:-1] in defined)
                    for word in words
                )
            if not fine:
                found.append(declaration)
    return found


def test_every_rule_is_understood():
    assert problems(STYLE) == []


@pytest.mark.parametrize(
    "name", ["max-width", "font-size", "text-align", "font-variant-numeric", "sans-serif"]
)
def test_a_name_broken_at_its_hyphen_is_noticed(name):
    assert name in STYLE
    head, tail = name.rsplit("-", 1)
    assert problems(STYLE.replace(name, f"{head}-\n{tail}"))


def colours(rules: str) -> dict[str, str]:
    return dict(re.findall(r"(--[a-z]+):(#[0-9a-f]+)", rules))


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    digits = colour[1:] if len(colour) == 7 else "".join(c + c for c in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_light_and_dark_differ_and_both_can_be_read():
    """Every colour has another value in the dark; text has WCAG's contrast of 4.5 in both."""
    dark = colours(MEDIA.search(STYLE)[1])
    light = colours(MEDIA.sub("", STYLE))
    assert set(dark) == set(light) and all(dark[k] != light[k] for k in dark)
    assert luminance(light["--back"]) > 0.5 > luminance(dark["--back"])
    for scheme in (light, dark):
        for text in ("--ink", "--faint", "--good", "--bad"):
            for back in ("--back", "--card"):
                low, high = sorted((luminance(scheme[text]), luminance(scheme[back])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)
    assert "background:var(--back)" in STYLE and "color:var(--ink)" in STYLE
