"""The Dockerfile, as far as it can be checked without Docker: paths, commands, packages, flags, and its build."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from odtk.cli import build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}


def steps() -> list[tuple[str, str]]:
    """Each instruction with its arguments, on one line."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def scripts() -> list[str]:
    """What the RUN steps give to the shell."""
    return [re.sub(r"^(--mount=\S+\s+)+", "", rest) for name, rest in steps() if name == "RUN"]


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of each COPY."""
    return [(words[:-1], words[-1]) for words in (rest.split() for name, rest in steps() if name == "COPY")]


def test_every_instruction_and_stage_exists() -> None:
    assert {name for name, _ in steps()} <= INSTRUCTIONS
    stages = [rest for name, rest in steps() if name == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:25\.10-py3$", TEXT, re.M)
    mounts = re.findall(r"--mount=type=bind,from=(\w+),source=(\S+),target=(\S+)", TEXT)
    assert [mount[0] for mount in mounts] == ["build"]
    assert f"--wheel-dir {mounts[0][1]} " in TEXT and f"ls {mounts[0][2]}/odtk-*.whl" in TEXT


def test_every_path_that_is_copied_exists_and_is_sent() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for sources, _ in copied():
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source


def test_every_command_is_one() -> None:
    for script in scripts():
        subprocess.run(["bash", "-n", "-c", script], check=True)
        for part in re.split(r"\s*&&\s*", script):
            words = [word for word in shlex.split(part) if not re.match(r"\w+=", word)]
            name = words[0] if words else "ls"  # an assignment alone, from $(ls …)
            found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True).returncode == 0
            assert found or shutil.which(name), f"{name} in: {part}"


def test_every_package_and_extra_is_named_right() -> None:
    needed = {Requirement(text).name for text in PROJECT["build-system"]["requires"]}
    (tools,) = [shlex.split(script) for script in scripts() if "pybind11" in script]
    given = [Requirement(word) for word in tools[tools.index("install") + 1 :] if not word.startswith("--")]
    assert {one.name for one in given} == needed
    assert {str(one) for one in given} == {str(Requirement(text)) for text in PROJECT["build-system"]["requires"]}
    (installed,) = re.findall(r'"(odtk\[.*?\] @ [^"]*)"', TEXT)
    requirement = Requirement(installed.replace("${wheel}", "/wheels/odtk.whl"))
    assert requirement.extras and requirement.extras <= set(PROJECT["project"]["optional-dependencies"])


def test_what_is_asked_of_the_extension_exists() -> None:
    bindings = (ROOT / "csrc" / "engine" / "bindings.cpp").read_text(encoding="utf-8")
    for name in re.findall(r"_C\.(\w+)", TEXT):
        assert f'm.attr("{name}")' in bindings
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name in ("ODTK_CUDA", "ODTK_CUDA_ARCH"):
        assert f"{name}=" in TEXT and name in setup


def test_it_does_not_run_as_root_and_starts_odtk() -> None:
    last = dict(steps())
    assert last["USER"] == "odtk" and any(script.startswith("useradd") for script in scripts())
    assert last["ENTRYPOINT"] == '["odtk"]' and "odtk" in PROJECT["project"]["scripts"]
    order = [name for name, _ in steps()]
    assert "RUN" not in order[order.index("USER") :]  # nothing needs root after it


def test_the_commands_in_its_comment_are_right() -> None:
    comment = " ".join(line.lstrip("# ") for line in TEXT.splitlines() if line.startswith("#   "))
    runs = re.findall(r"docker run (.*?)(?=docker |$)", comment.replace("\\ ", ""))
    assert len(runs) == 2
    for run in runs:
        words = shlex.split(run)
        build_parser().parse_args(words[words.index("odtk") + 1 :])


def test_what_is_copied_is_enough_for_the_build(tmp_path: Path) -> None:
    for sources, destination in copied():
        for source in sources:
            target = tmp_path / "src" / (source if destination == "./" else destination)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target)
    (script,) = [script for script in scripts() if "pip wheel" in script]
    # As it stands there, but for the folder of the wheels, and without the compiler of the base image.
    script = script.replace("ODTK_CUDA=1", "ODTK_CUDA=0").replace("/wheels", str(tmp_path / "wheels"))
    script = script.replace("python -m", f"{shlex.quote(sys.executable)} -m")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path / "src",
        env={**os.environ, "ODTK_CUDA_ARCH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wheels").glob("odtk-*.whl"))) == 1
