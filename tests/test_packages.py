"""What `make dist` builds: what is in it, how it is tagged, and that it runs outside the clone."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from odtk import __version__
from odtk.training.log import TRACKERS
from release.build import ROOT, build_sdist, build_wheel
from release.check import NOT_FOR_USERS
from release.trial import CHAIN, attempt
from setup import find_nvcc


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("sdist"))


def tags(wheel: Path) -> tuple[str, list[str] | None]:
    """What the WHEEL file says: is it pure, and which Pythons and machines it fits."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        said = Parser().parsestr(archive.read(name).decode())
    return said["Root-Is-Purelib"], said.get_all("Tag")


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "odtk").rglob("*.py")}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "odtk/py.typed"}
    assert sdist.name == f"odtk-{__version__}.tar.gz"
    assert needed <= held, needed - held
    assert not [name for name in held if name.startswith(("tests", "docs", "build")) or name.endswith((".so", ".pyc"))]


def test_without_the_extension_a_wheel_fits_every_python(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, extension=False)
    assert wheel.name == f"odtk-{__version__}-py3-none-any.whl"
    assert tags(wheel) == ("true", ["py3-none-any"])
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    assert "odtk/cli.py" in held and "odtk/deploy/deepstream_parser/CMakeLists.txt" in held
    assert not [name for name in held if name.endswith(".so") or not name.startswith(("odtk/", "odtk-"))]


def test_a_compiler_that_fails_leaves_a_pure_wheel_too(sdist: Path, tmp_path: Path, capfd) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    # "auto" as in `pip install odtk-….tar.gz`, where the extension is built if it can be.
    settings = {"ODTK_CUDA": "auto", "CUDACXX": str(compiler)}
    wheel = build_wheel(sdist, tmp_path, extension=False, environment=settings)
    assert tags(wheel) == ("true", ["py3-none-any"])
    assert "odtk._C was NOT built" in capfd.readouterr().err


def test_the_error_that_misses_a_package_names_its_extra() -> None:
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^([\w-]+) = \[", listed.partition("\n[")[0], re.M)) - set(NOT_FOR_USERS)
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "odtk").rglob("*.py"))
    named = set(re.findall(r"odtk\[([\w-]+)\]", text)) | set(re.findall(r"\(or ([\w-]+)\)", text))
    if "odtk[{name}]" in text:  # --log-to's
        named |= set(TRACKERS)
    assert {"cuda13", "tensorrt-cu13", "video", "pretrained", "report", "scale"} <= extras
    assert extras <= named


@pytest.mark.slow
def test_the_wheel_runs_outside_the_clone(sdist: Path, tmp_path: Path) -> None:
    printed = attempt(build_wheel(sdist, tmp_path, extension=False), beside=True)
    assert "no: not built" in printed["info"] and __version__ in printed["info"]
    assert "AP50" in printed["infer"]


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_the_extension_is_in_a_manylinux_wheel(sdist: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ODTK_CUDA_ARCH", "90")
    wheel = build_wheel(sdist, tmp_path, extension=True)
    pure, found = tags(wheel)
    assert pure == "false" and found and all("manylinux" in tag for tag in found)
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("odtk/_C.") for name in archive.namelist())
    assert "CUDA of odtk._C" in attempt(wheel, CHAIN[:1], beside=True)["info"]
