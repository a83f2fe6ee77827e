"""Tries the oldest and the newest versions of odtk's requirements that resolve, each in a throwaway environment.

    python -m tests.versions [oldest newest] [--tests PATH …]

uv finds the versions (the lower bounds of pyproject.toml, or the newest releases) for this interpreter; they are
installed from wheels beside the packages of this environment, which they hide. torch, and pytest with what only tests
need, are this environment's own. Then every module of odtk is imported, and quick tests of each requirement's use run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from release.trial import environment

ROOT = Path(__file__).resolve().parents[1]
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
OWN = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")  # torch and what it brings with it
PARTS = ["data/test_table.py", "data/test_headers.py", "data/test_images.py", "model/test_checkpoint.py"]
PARTS += ["exporting/test_export.py", "exporting/test_metadata.py", "inference/test_backends.py"]
PARTS += [
    "evaluation/test_evaluate.py",
    "training/test_log.py",
    "test_settings.py",
    "test_terminal.py",
    "test_files.py",
]
IMPORT_ALL = """
import importlib, pkgutil, odtk
for module in pkgutil.walk_packages(odtk.__path__, "odtk."):
    if module.name not in ("odtk.__main__", "odtk._C", "odtk.libodtk_plugins"):
        importlib.import_module(module.name)
"""


def resolve(uv: Path, resolution: str, folder: Path) -> list[str]:
    """The requirements of pyproject.toml and theirs as NAME==VERSION, without those of OWN."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    command: list[str | Path] = [
        uv,
        "pip",
        "compile",
        ROOT / "pyproject.toml",
        "--resolution",
        resolution,
        "--constraint",
        pinned,
    ]
    command += ["--python-version", "{}.{}".format(*sys.version_info), "--only-binary", ":all:"]
    command += ["--no-header", "--no-annotate", "--quiet"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return [line for line in lines if line and not OWN.match(line)]


def direct() -> set[str]:
    """The names of the requirements in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    return {name.lower() for name in re.findall(r'"([\w-]+)', listed)}


def attempt(uv: Path, name: str, folder: Path, tests: list[str]) -> bool:
    """Installs and tests one resolution; whether all went well."""
    wanted = resolve(uv, RESOLUTIONS[name], folder)
    shown = [line for line in wanted if line.partition("==")[0].lower() in direct()]
    print(f"{name}: {', '.join(shown)}; torch=={version('torch')} as it is here", flush=True)
    python = environment(folder / name, beside=True)
    # pip leaves what lies outside of its environment, and installs beside it.
    install: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--force-reinstall",
    ]
    subprocess.run([*install, *wanted], check=True)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    for command in (
        ["-c", IMPORT_ALL],
        ["-m", "pytest", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *tests],
    ):
        if subprocess.run([python, *command], cwd=ROOT, env=variables).returncode:
            print(f"{name}: FAILED", flush=True)
            return False
    print(f"{name}: passed in {time.monotonic() - started:.0f} s", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="WHICH", help="oldest, newest (both)")
    parser.add_argument("--tests", nargs="+", default=[f"tests/{part}" for part in PARTS], metavar="PATH")
    args = parser.parse_args()
    if unknown := set(args.which) - set(RESOLUTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: it is oldest or newest")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment(folder / "uv")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        passed = [attempt(folder / "uv/bin/uv", name, folder, args.tests) for name in args.which or RESOLUTIONS]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
