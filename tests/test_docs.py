"""What the pages say: their python runs, their commands parse, and all that they name exists."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for part in (".", "docs", "benchmarks/**") for p in ROOT.glob(f"{part}/*.md"))
ROOMS = (
    "csrc", "d2m_kernels", "d2m_models", "distill", "benchmarks", "integrations", "tests", "docs"
)  # fmt: skip
SOURCE = re.compile(r"[\w-]+\.(py|sh|md|h|cpp|cu|cuh|toml|in)")  # a file of ours, by its name alone
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, lang, code in FENCE.findall(page.read_text()) if lang == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def commands(page: Path) -> list[list[str]]:
    """The words of every command that a page shows, in blocks and in backticks."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()] + spans(
        prose(page)
    )
    simple = [part for line in lines for part in re.split(r"&&|\|\|", line) if "..." not in part]
    found = []
    for part in simple:
        try:
            found.append(shlex.split(part, comments=True))
        except ValueError:  # an apostrophe: words, not a command
            continue
    return [words for words in found if words]


def python_snippets():
    heavy = ("import FeedForward", "from distill")  # 5 to 9 s of CPU time, most of it imports
    return [
        pytest.param(
            code,
            id=f"{page.name}-{i}",
            marks=[pytest.mark.slow] if any(word in code for word in heavy) else [],
        )
        for page in PAGES
        for i, code in enumerate(blocks(page, "python"))
    ]


@pytest.mark.long
@pytest.mark.parametrize("code", python_snippets())
def test_snippet_runs(code, tmp_path):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install '.[demo]' && d2m demo" in text
    assert "\npip install '.[test]' && pytest\n" in text  # .ci/run takes this line


def test_the_readme_fits_on_three_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_d2m_commands_parse(page):
    """Every option shown is one that the command has."""
    pytest.importorskip("diffusers")
    from distill.cli import parser

    for words in commands(page):
        if words[:2] == ["python", "-m"] and words[2:3] == ["distill"]:
            words = ["d2m", *words[3:]]
        # a name alone ("d2m distill") is spoken of, not called
        if words[0] == "d2m" and len(words) > 2 and words[1] != "--help":
            try:
                parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{page.name}: {shlex.join(words)}")
        elif words[0] == "d2m" and len(words) == 2:
            choices = next(a.choices for a in parser()._actions if a.dest == "command")
            assert words[1] in choices, f"{page.name}: {shlex.join(words)}"


@each_page
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", FENCE.sub("", linked.read_text()), re.M)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page.name} links to {target}"


def missing(word: str, beside: Path) -> bool:
    """Whether a word looks like a file of this repository and is none."""
    if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word) is None:
        return False
    first, *rest = word.split("/")
    if first in ROOMS and rest:
        return not list(ROOT.glob(word.rstrip("/")))
    if SOURCE.fullmatch(word):
        near = [beside / word, ROOT / word, *(f for r in ROOMS for f in (ROOT / r).rglob(word))]
        return not any(path.exists() for path in near)
    return False


@each_page
def test_files_named_exist(page):
    """Every path in backticks or in a command: from the root, or a source file by its name."""
    words = {w for command in commands(page) for w in command} | set(spans(prose(page)))
    assert sorted(w for w in words if missing(w, page.parent)) == []


@each_page
def test_modules_named_exist(page):
    for name in spans(prose(page)):
        if not re.fullmatch(r"(d2m_kernels|d2m_models|distill)(\.\w+)+", name):
            continue
        pytest.importorskip("diffusers")
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            pytest.fail(f"{page.name}: {name}: {error}")


def test_the_tree_is_the_repository():
    """The README's tree names every folder of the packages, and no other."""
    (tree,) = (b for b in blocks(ROOT / "README.md", "text") if b.startswith("csrc/"))
    shown, top = set(), ""
    for indent, folder in re.findall(r"^( *)(\S+)/ ", tree, re.M):
        top = top if indent else folder
        shown.add(f"{top}/{folder}" if indent else folder)
    real = set(ROOMS)
    for package in ("d2m_kernels", "d2m_models", "distill", "benchmarks"):
        inner = (p for p in (ROOT / package).iterdir() if list(p.glob("*.py")))
        real |= {f"{package}/{p.name}" for p in inner}
    assert shown == real


def test_the_guides_name_what_is_there():
    """In docs/contributing.md every name of a step stands in one of the files of that step."""
    guide = (ROOT / "docs" / "contributing.md").read_text()
    sections = re.split(r"^## ", guide, flags=re.M)[1:5]
    assert [s.split("\n")[0] for s in sections] == [
        "An activation",
        "An op",
        "A back-end",
        "A claim",
    ]
    for section in sections:
        steps = re.split(r"^\d\. ", section, flags=re.M)[1:]
        assert 1 < len(steps) <= 6
        for step in steps:
            words = spans(step)
            paths = [ROOT / w for w in words if "/" in w and (ROOT / w).exists()]
            files = [p for p in paths if p.is_file()]
            files += [f for p in paths if p.is_dir() for f in p.rglob("*.[cph]*")]
            text = "\n".join(f.read_text(encoding="utf-8") for f in files if f.suffix != ".png")
            for word in words:
                name = re.match(r"([A-Za-z_]\w*)(\(.*\))?$", word, re.S)
                if name and files:
                    assert re.search(rf"\b{name[1]}\b", text), f"{word} in: {step}"
