"""Who may import whom. Imports run down the layers, never up and never in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Lowest first. A name is a module, or a room with all that is in it; the modules of a room may
# import each other, those of two rooms only downwards.
LAYERS = {
    "d2m_kernels": """
        _version contract activations tensors
        eager checks onednn op backends
        backends.reference backends.nvrtc
        backends.native
        backends.torch backends.triton
        backends.cpu backends.cuda
        route permute grouped_gemm combine ffn
        modulate
        moe_ffn
        moe_ffn_pair
        __init__
        __main__
    """,
    "d2m_models": """
        config files private
        presets weights partition
        moe
        mob adaln topk
        blocks output lora
        flux
        conversion
        checkpoints
        inspection
        commands
        __init__
    """,
    "distill": """
        errors
        files device configs
        families
        page data
        loop prepare
        importance sampling
        students teacher stages evaluate
        pipeline
        study plan prompts survey calibrate
        commands
        cli
        __main__ __init__
    """,
    "benchmarks": """
        report
        harness
        *
    """,
}
PACKAGES = list(LAYERS)


def modules() -> dict[str, Path]:
    """{dotted name: file} of everything in the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__") if name.count(".") > 1 else name] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def resolve(name: str) -> str | None:
    """The module of ours that an imported name is, or lies in."""
    parts = name.split(".")
    for prefix in ("", "benchmarks."):  # benchmarks/ is on the path, no package
        for end in range(len(parts), 0, -1):
            found = prefix + ".".join(parts[:end])
            for module in (found, f"{found}.__init__"):
                if module in MODULES:
                    return module
    return None


GRAPH = {
    name: {m for i in imports(path) if (m := resolve(i)) is not None and m != name}
    for name, path in MODULES.items()
}


def place(module: str) -> tuple[int, str]:
    """(layer, room) of a module within its package."""
    package, _, inner = module.partition(".")
    lines = [line.split() for line in LAYERS[package].strip().splitlines()]
    for end in range(inner.count(".") + 1, 0, -1):
        room = ".".join(inner.split(".")[:end])
        for layer, rooms in enumerate(lines):
            if room in rooms and (room != "backends" or inner == room):
                return layer, room
    assert lines[-1] == ["*"], f"{module} has no place in LAYERS of {Path(__file__).name}"
    return len(lines) - 1, "*"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    package = module.partition(".")[0]
    layer, room = place(module)
    for other in sorted(GRAPH[module]):
        theirs = other.partition(".")[0]
        if theirs != package:
            assert PACKAGES.index(theirs) < PACKAGES.index(package), f"{module} imports {other}"
            continue
        other_layer, other_room = place(other)
        assert other_layer < layer or other_room == room, f"{module} imports {other}"


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names one


def test_only_one_room_knows_the_extensions():
    knowing = {
        m for m, path in MODULES.items() if re.search(r"\b_d2m_(cpu|cuda)\b", path.read_text())
    }
    allowed = {"d2m_kernels.backends.native", "d2m_kernels.backends.nvrtc"}
    assert knowing - {"d2m_kernels.__main__"} <= allowed  # which only reports where they lie


def test_names_the_faces_export_are_no_modules():
    """A file or folder of that name would hide the function once it is imported."""
    import d2m_models

    beside = {path.stem for path in (ROOT / "d2m_models").iterdir()}
    assert not beside & set(d2m_models.__all__)
