"""Builds odtk._C for the CPU: the kernels and bindings of csrc, compiled by g++ against an emulation of CUDA."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.shared import locked

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "engine" / "bindings.cpp"]
BUILD = HERE.parents[1] / "build" / "emulation"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-x",
    "c++",
    '-DPYBIND11_STDLIB="_emulated"',
    '-DODTK_ARCHITECTURES="emulated"',
]  # PYBIND11_STDLIB sets the module apart from the real _C in the same process


def build() -> ModuleType:
    """The emulated module, compiled once per state of the sources; skips the test if g++ or pybind11 is missing."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels")
    pybind11 = pytest.importorskip("pybind11")
    files = [*SOURCES, *sorted((CSRC / "cuda").glob("*.*h")), *sorted(HERE.glob("*.h"))]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files) + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = BUILD / digest / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with locked(library.parent):
        if not library.exists():
            compile_to(library, compiler, pybind11.get_include())
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_to(library: Path, compiler: str, pybind11: str) -> None:
    """Compiles the sources side by side.

    Args:
        pybind11: the folder of its headers.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{d}" for d in (HERE, CSRC, pybind11, sysconfig.get_path("include"))]
    objects = [library.parent / f"{source.stem}.o" for source in SOURCES]
    commands = [
        [compiler, *FLAGS, *includes, "-c", str(source), "-o", str(target)]
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in running] == [0] * len(running), "the emulated kernels do not compile"
    part = library.with_suffix(".part")
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(part)], check=True)
    part.rename(library)


@contextmanager
def seed(value: int) -> Iterator[None]:
    """Within it, the order of threads and blocks is drawn from this seed."""
    os.environ["ODTK_EMULATION_SEED"] = str(value)
    try:
        yield
    finally:
        del os.environ["ODTK_EMULATION_SEED"]
