"""What setup.py builds and what is in the sdist and the wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from d2m_kernels._version import __version__
from d2m_kernels.backends import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_py():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("d2m_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------- build switches


@pytest.mark.parametrize(
    "given,expected",
    [
        (None, "80-real;90a-real;80-virtual"),
        ("  ", "80-real;90a-real;80-virtual"),
        ("8.0", "80-real"),
        ("8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"),
        ("8.0 8.6 12.0f+PTX", "80-real;86-real;120f-real;120f-virtual"),
        ("9.0;9.0;10.3", "90-real;103-real"),
        ("Hopper;8.0", "90-real;90-virtual;80-real"),
    ],
)
def test_archs(setup_py, given, expected):
    assert setup_py.cmake_archs(given) == expected


@pytest.mark.parametrize("given", ["sm_90", "9", "9.0b", "8.0,9.0", "8.0+ptx"])
def test_bad_archs_are_named(setup_py, given):
    with pytest.raises(ValueError, match=re.escape(given)):
        setup_py.cmake_archs(f"8.0;{given}")


def test_cuda_mode(setup_py):
    given = {None: "auto", "": "auto", "auto": "auto", "AUTO": "auto", "0": "0", "1": "1"}
    assert {k: setup_py.cuda_mode(k) for k in given} == given
    with pytest.raises(ValueError, match="D2M_CUDA is 'yes', expected auto, 0 or 1"):
        setup_py.cuda_mode("yes")


@pytest.mark.skipif(os.name == "nt", reason="makes POSIX executables")
def test_find_nvcc(setup_py, tmp_path):
    def make(*parts):
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    on_path, at_home, own = make("p", "nvcc"), make("home", "bin", "nvcc"), make("own")
    env = {"PATH": str(tmp_path / "p"), "CUDA_HOME": str(tmp_path / "home"), "CUDACXX": own}
    assert setup_py.find_nvcc(env) == own
    assert setup_py.find_nvcc({**env, "CUDACXX": ""}) == at_home
    assert setup_py.find_nvcc({"PATH": env["PATH"], "CUDA_HOME": str(tmp_path)}) == on_path
    assert setup_py.find_nvcc({"PATH": str(tmp_path)}) is None


def test_auto_gives_up_cuda_and_keeps_cpu(setup_py, monkeypatch, capsys):
    """An nvcc that fails costs the CUDA module and is told; with D2M_CUDA=1 it is an error."""
    from setuptools import Distribution, Extension

    def build(mode, nvcc):
        extensions = [Extension(name, sources=[]) for name in ("_d2m_cpu", "_d2m_cuda")]
        command = setup_py.CMakeBuild(Distribution({"ext_modules": extensions}))
        command.ensure_finalized()
        built = []

        def cmake(ext, module, _nvcc):
            if module == "cuda":
                raise subprocess.CalledProcessError(1, "nvcc")
            built.append(ext.name)

        monkeypatch.setattr(command, "_cmake", cmake)
        monkeypatch.setattr(setup_py, "find_nvcc", lambda env: nvcc)
        monkeypatch.setenv("D2M_CUDA", mode)
        command.run()
        return built, [e.name for e in command.extensions]

    assert build("auto", "/bin/nvcc") == (["_d2m_cpu"], ["_d2m_cpu"])
    assert "without _d2m_cuda: the build with /bin/nvcc failed" in capsys.readouterr().err
    assert build("auto", None) == (["_d2m_cpu"], ["_d2m_cpu"])
    assert "no nvcc" in capsys.readouterr().err
    assert build("0", "/bin/nvcc") == (["_d2m_cpu"], ["_d2m_cpu"])
    with pytest.raises(RuntimeError, match="building _d2m_cuda failed"):
        build("1", "/bin/nvcc")
    with pytest.raises(RuntimeError, match="D2M_CUDA=1 but no nvcc"):
        build("1", None)


# --------------------------------------------------------------------------------------- contents


def test_abi_is_the_same_in_python_and_c():
    text = (ROOT / "csrc" / "abi.h").read_text()
    assert int(re.search(r"#define D2M_ABI (\d+)", text)[1]) == native.ABI


def test_version_is_stated_once():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version = \"", pyproject, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory):
    """What is under version control's eye, without caches and builds."""
    tree = tmp_path_factory.mktemp("tree") / "dense2moe"
    ignore = shutil.ignore_patterns(
        ".git", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", ".venv", "venv"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    return tree


def backend(tree, call, out):
    """One hook of the build back-end, in a process of its own; returns the file it made."""
    for package in ("setuptools", "wheel", "pybind11", "cmake", "ninja"):
        if importlib.util.find_spec(package) is None and shutil.which(package) is None:
            pytest.skip(f"{package} is not here and a build without isolation needs it")
    code = f"import setuptools.build_meta as b; print('made', b.{call}({str(out)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=300,
        env={**os.environ, "D2M_CUDA": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return out / re.search(r"made (\S+)", run.stdout)[1]


def setup_build_lib():
    """The name of setuptools' folder for built files, below build/."""
    from setuptools import Distribution

    command = Distribution().get_command_obj("build")
    command.ensure_finalized()
    return Path(command.build_platlib).name


def sources(folder, *suffixes):
    return {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / folder).rglob("*")
        if p.suffix in suffixes and "__pycache__" not in p.parts
    }


@pytest.mark.slow
def test_sdist(clean_tree, tmp_path):
    made = backend(clean_tree, "build_sdist", tmp_path)
    with tarfile.open(made) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    needed = {"LICENSE", "README.md", "CMakeLists.txt", "setup.py", "pyproject.toml"}
    needed |= sources("csrc", ".h", ".cpp", ".cu", ".cuh") | sources("d2m_kernels", ".py")
    needed |= sources("distill", ".py", ".yaml", ".json", ".safetensors") | sources(
        "d2m_models", ".py"
    )
    needed |= sources("tests", ".py", ".cpp", ".h", ".sh")
    needed |= sources("docs", ".md", ".png") | sources("benchmarks", ".py", ".sh", ".md")
    needed |= sources("benchmarks/results", ".json", ".html", ".png")
    assert needed <= names, needed - names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if known.returncode == 0:  # a clone: nothing of it is missing but what serves git and CI
        assert set(known.stdout.split()) - names <= {".gitignore", ".ci/run"}

    # its tests of the README, the docs and the committed results pass where it is unpacked
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(made) as tar:
        tar.extractall(tmp_path / "unpacked", **safe)
    (root,) = (tmp_path / "unpacked").iterdir()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_docs.py",
         "tests/benchmarks/test_benchmarks_report.py", "-k",
         "committed or links or commands or fresh"],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.search(r"\d passed", run.stdout), run.stdout


@pytest.mark.slow
def test_wheel(clean_tree, tmp_path):
    # what earlier builds, with other switches or of other sources, have left does not get in
    lib = clean_tree / "build" / setup_build_lib()
    (lib / "d2m_kernels").mkdir(parents=True)
    (lib / "d2m_kernels" / "gone.py").touch()
    (lib / "_d2m_cuda.so").touch()
    made = backend(clean_tree, "build_wheel", tmp_path)
    with zipfile.ZipFile(made) as wheel:
        names = set(wheel.namelist())
        entry_points = next(n for n in names if n.endswith("entry_points.txt"))
        assert "d2m = distill.cli:main" in wheel.read(entry_points).decode()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    needed = sources("d2m_kernels", ".py") | sources(
        "distill", ".py", ".yaml", ".json", ".safetensors"
    )
    needed |= sources("d2m_models", ".py")
    needed |= {f"d2m_kernels/csrc/{p.name}" for p in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert needed <= names, needed - names
    assert "d2m_kernels/gone.py" not in names
    tops = {n.split("/")[0] for n in names}
    modules = {t for t in tops if t.startswith("_d2m")}
    assert len(modules) == 1 and modules.pop().startswith("_d2m_cpu")  # D2M_CUDA=0
    assert {t for t in tops if "." not in t} == {"d2m_kernels", "d2m_models", "distill"}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert f"\nVersion: {__version__}\n" in metadata
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    plain = [r for r in required if "extra ==" not in r]
    assert sorted(re.match(r"[\w-]+", r)[0] for r in plain) == ["numpy", "torch", "triton"]
    assert not any("<" in r or "==" in r.split(";")[0] for r in plain)  # no torch is displaced


# ----------------------------------------------------------------------------------------- import


def test_import_pulls_in_nothing_heavy():
    """torch and nothing else that is large, with the optional packages out of reach."""
    code = """
        import sys
        blocked = ("diffusers", "transformers", "sklearn", "matplotlib", "cupy", "triton")
        sys.modules.update(dict.fromkeys(blocked))  # None: "no such module", also for find_spec
        import d2m_kernels, torch
        y = d2m_kernels.moe_ffn(
            torch.randn(5, 8), torch.randn(4, 8), torch.randn(16, 8), torch.randn(8, 16)
        )
        assert y.shape == (5, 8)
        assert not [m for m in sys.modules if m.split(".")[0] in blocked and sys.modules[m]]
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def test_extensions_are_found_from_inside_the_clone():
    if native.cpu_available() is not None:
        pytest.skip("_d2m_cpu is not installed")
    code = "import d2m_kernels, _d2m_cpu; print(d2m_kernels.__file__); print(_d2m_cpu.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr
    package, extension = run.stdout.split()
    assert Path(package).is_relative_to(ROOT) and "_d2m_cpu" in extension
