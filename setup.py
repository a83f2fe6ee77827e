"""Drives CMake for the optional extension odtk._C; all metadata is in pyproject.toml.

Without a CUDA compiler the package installs as pure Python, and its wheel fits every Python and machine (py3-none-any).
Either way the build says what it built, what it left out and how to get it (`pip install -v .` shows it). Environment:
    CUDACXX, CUDA_HOME    where nvcc is, beside PATH and /usr/local/cuda
    TENSORRT_ROOT         where TensorRT's headers and libraries are (csrc/CMakeLists.txt looks in other places too)
    ODTK_CUDA_ARCH        compute capabilities without the dot, e.g. "80;90"; all known ones by default
    ODTK_CUDA=0           leave the extension out;  ODTK_CUDA=1  refuse to install without it
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> Path | None:
    """CUDACXX, CUDA_HOME/bin/nvcc, nvcc on PATH, /usr/local/cuda/bin/nvcc: the first that is there."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(1, f"{home}/bin/nvcc")
    return next((Path(c) for c in candidates if c and Path(c).is_file()), None)


def say(line: str) -> None:
    print(f"odtk: {line}", file=sys.stderr, flush=True)


class BuildExtension(build_ext):
    """Configures and builds csrc/ with CMake and puts the libraries beside the package's Python files."""

    def run(self) -> None:
        wanted = os.environ.get("ODTK_CUDA", "auto")
        nvcc = None if wanted == "0" else find_nvcc()
        if nvcc:
            try:
                self.build_with_cmake(nvcc)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                if wanted == "1":
                    raise SystemExit(f"odtk: the extension could not be built: {error}") from error
                say(f"odtk._C was NOT built: {error}. The compiler's messages are above (pip install -v shows them).")
        elif wanted == "1":
            raise SystemExit("odtk: ODTK_CUDA=1, but no nvcc: set CUDACXX or CUDA_HOME, or put nvcc on PATH.")
        else:
            reason = "ODTK_CUDA=0" if wanted == "0" else "no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
            say(f"odtk._C was left out ({reason}). Everything runs without it, in PyTorch.")
        say("To get the CUDA kernels: install the CUDA toolkit (nvcc) and a C++17 compiler, then install odtk again.")
        for stale in [*self.destination().glob("_C*.so"), *self.destination().glob("libodtk_plugins*.so")]:
            stale.unlink()  # of an earlier build in this folder, which a wheel would take up
        self.extensions: list[Extension] = []
        self.distribution.ext_modules = []  # so the wheel is tagged as pure Python

    def destination(self) -> Path:
        """Where the libraries go: the package's folder in the build, or in the source tree with --inplace."""
        return Path(self.get_ext_fullpath("odtk._C")).resolve().parent

    def build_with_cmake(self, nvcc: Path) -> None:
        import pybind11

        build = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # Afresh: pip's build environment, and with it the ninja that an earlier cache names, is another at each build.
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(
            [
                "cmake",
                "--fresh",
                "-S",
                str(ROOT / "csrc"),
                "-B",
                str(build),
                *generator,
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DODTK_CUDA_ARCH={os.environ.get('ODTK_CUDA_ARCH', '')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(self.destination())], check=True)
        for line in (build / "built.txt").read_text().splitlines():
            say(line)

    def copy_extensions_to_source(self) -> None:
        """Nothing: with --inplace get_ext_fullpath is the source tree already, and CMake has installed there."""


class Wheel(bdist_wheel):
    """Tagged by what was built: bdist_wheel alone decides it before the build, from ext_modules."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


if __name__ == "__main__":  # as build backends run it, too
    setup(
        ext_modules=[Extension("odtk._C", sources=[])],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    )
