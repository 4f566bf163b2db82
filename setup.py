"""Builds the extensions with CMake + Ninja + pybind11; everything else is in pyproject.toml.

D2M_CUDA=auto|0|1       build `_d2m_cuda`: if nvcc is there and works (default) | never | must
TORCH_CUDA_ARCH_LIST    torch's syntax, "8.0;9.0a+PTX"; default: sm_80, sm_90a, compute_80 PTX
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# PTX for compute_80, as sm_90a PTX is not forward-compatible: no later GPU would run it.
DEFAULT_ARCHS = "80-real;90a-real;80-virtual"
NAMED_ARCHS = {  # torch's names for groups
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;12.0+PTX",
}


def cmake_archs(arch_list: str | None) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX", blanks or semicolons) -> CMAKE_CUDA_ARCHITECTURES."""
    entries = re.split(r"[;\s]+", (arch_list or "").strip())
    entries = [e for e in entries if e]
    if not entries:
        return DEFAULT_ARCHS
    entries = [part for e in entries for part in NAMED_ARCHS.get(e.lower(), e).split(";")]
    out: list[str] = []
    for entry in entries:
        m = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if m is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST entry {entry!r}: expected <major>.<minor>[a|f][+PTX], "
                "for example '8.0;9.0a+PTX'"
            )
        arch = m[1] + m[2] + m[3]
        out.append(f"{arch}-real")
        if m[4]:
            out.append(f"{arch}-virtual")
    return ";".join(dict.fromkeys(out))


def cuda_mode(value: str | None) -> str:
    """Read D2M_CUDA: 'auto' (also when unset or empty), '0' or '1'."""
    mode = (value or "auto").strip().lower()
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"D2M_CUDA is {value!r}, expected auto, 0 or 1")
    return mode


def find_nvcc(env: dict[str, str]) -> str | None:
    """First of $CUDACXX, $CUDA_HOME/bin/nvcc, $CUDA_PATH/bin/nvcc and nvcc on PATH that exists."""
    exe = "nvcc.exe" if os.name == "nt" else "nvcc"
    if env.get("CUDACXX"):
        return shutil.which(env["CUDACXX"], path=env.get("PATH", ""))
    for var in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(var) and (Path(env[var]) / "bin" / exe).is_file():
            return str(Path(env[var]) / "bin" / exe)
    return shutil.which(exe, path=env.get("PATH", ""))


def real_nvcc(nvcc: str) -> str:
    """Follow a wrapper script to the toolkit's own nvcc (a dry run prints `#$ TOP=<toolkit>`)."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    m = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    if m:
        path = Path(m[1].strip()) / "bin" / Path(nvcc).name
        if path.is_file():
            return str(path.resolve())
    return nvcc


class CleanBuildPy(build_py):
    """Python files that are gone from the sources do not come back from an earlier build."""

    def run(self) -> None:
        if not self.editable_mode:
            for top in {package.split(".")[0] for package in self.packages}:
                shutil.rmtree(Path(self.build_lib) / top, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake build per module, so that a failing CUDA build leaves the CPU one alone."""

    def run(self) -> None:
        for stale in Path(self.build_lib).glob("_d2m_*"):  # of a build with other switches
            stale.unlink()
        mode = cuda_mode(os.environ.get("D2M_CUDA"))
        nvcc = find_nvcc(dict(os.environ)) if mode != "0" else None
        if nvcc is None:
            reason = "D2M_CUDA=0" if mode == "0" else "no nvcc (PATH, $CUDA_HOME/bin, $CUDACXX)"
            if mode == "1":
                raise RuntimeError(f"D2M_CUDA=1 but {reason}")
            self._without_cuda(reason)
        for ext in list(self.extensions):
            module = ext.name.removeprefix("_d2m_")
            try:
                self._cmake(ext, module, nvcc)
            except (subprocess.CalledProcessError, ValueError) as error:
                reason = error
                if isinstance(error, subprocess.CalledProcessError):
                    reason = f"cmake ended with status {error.returncode}, its output is above"
                if module != "cuda" or mode == "1":
                    raise RuntimeError(f"building {ext.name} failed: {reason}") from error
                self._without_cuda(f"the build with {nvcc} failed: {reason}")

    def _without_cuda(self, reason: str) -> None:
        self.extensions = [e for e in self.extensions if e.name != "_d2m_cuda"]
        self.distribution.ext_modules = self.extensions
        print(f"dense2moe: building without _d2m_cuda: {reason}", file=sys.stderr, flush=True)

    def _cmake(self, ext: Extension, module: str, nvcc: str | None) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / module
        shutil.rmtree(build, ignore_errors=True)  # its cache names an old isolated environment
        build.mkdir(parents=True)
        config = "Debug" if self.debug else "Release"
        args = [
            f"-DD2M_MODULE={module}",
            f"-DCMAKE_BUILD_TYPE={config}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_{config.upper()}={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if module == "cuda":
            args += [
                f"-DCMAKE_CUDA_COMPILER={real_nvcc(nvcc)}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cmake_archs(os.environ.get('TORCH_CUDA_ARCH_LIST'))}",
            ]
        if shutil.which("ninja"):
            args += ["-GNinja"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *args], check=True)
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(
            ["cmake", "--build", str(build), "--config", config, "--parallel", jobs], check=True
        )


# The device code travels as package data too, for NVRTC where there is no nvcc: csrc/cuda is
# installed as `d2m_kernels.csrc`.
PACKAGES = find_packages(include=["d2m_kernels*", "d2m_models*", "distill*"], exclude=["*.csrc"])

if __name__ == "__main__":
    setup(
        packages=[*PACKAGES, "d2m_kernels.csrc"],
        package_dir={"d2m_kernels.csrc": "csrc/cuda"},
        package_data={
            "d2m_kernels": ["*.json"],
            "d2m_kernels.csrc": ["*.cuh"],
            "distill": ["configs/*.yaml", "teachers/*/*"],
        },
        include_package_data=False,
        ext_modules=[Extension("_d2m_cpu", sources=[]), Extension("_d2m_cuda", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
    )
