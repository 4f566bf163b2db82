"""Every python snippet of the README and the docs runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets():
    for page in PAGES:
        if page.exists():
            for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
                yield pytest.param(code, id=f"{page.name}-{i}")


@pytest.mark.parametrize("code", snippets())
def test_snippet_runs(code, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install '.[demo]' && d2m demo" in text
    assert "pip install '.[test]' && pytest" in text


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
