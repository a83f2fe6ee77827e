"""Tries built packages as a user does: each is installed into a fresh environment, and the whole chain runs there.

    python release/trial.py dist/odtk-*.whl dist/odtk-*.tar.gz [--extras NAME…]
      [--constraint constraints.txt] [--beside]

The chain is odtk info, synth, train, export and infer, in a folder outside the clone, on the CPU. Without --beside, pip
installs the requirements too (torch among them, which takes minutes); with it, this environment's packages are used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

WHERE = "import odtk; print(odtk.__file__)"
TRAINING = "--iters 2 --batch 4 --resize 64 --max-size 96 --backbone-weights none --head-convs 1"
LOADER = "--loader torch --devices cpu"
CHAIN = (
    "info",
    "synth data --images 10 --size 64 96 --classes 2",
    f"train model.pth --annotations data/train.json --images data/train {TRAINING} {LOADER} --backbone ResNet18FPN",
    "export model.pth model.onnx --size 64 96 --devices cpu",
    f"infer model.onnx --images data/val --annotations data/val.json --output detections.json {LOADER}",
)


def environment(folder: Path, *, beside: bool = False) -> Path:
    """A new virtual environment; with ``beside`` it finds this one's packages behind its own. Returns its Python."""
    venv.create(folder, with_pip=not beside)
    python = folder / "bin" / "python"
    if beside:
        (site,) = folder.glob("lib/python*/site-packages")
        # Its folder alone, whose .pth files are not read: so a clone that is installed there is not found.
        (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def install(
    python: Path, package: Path, *, extras: Sequence[str] = (), constraint: Path | None = None, beside: bool = False
) -> None:
    """Installs a package with these extras and, unless it is ``beside`` them, its requirements."""
    # Beside this environment's packages its pip does it too; a pip of its own takes ten seconds to set up.
    command: list[str | Path] = [sys.executable, "-m", "pip", "--python", python] if beside else [python, "-m", "pip"]
    command += ["install", "--quiet", "--disable-pip-version-check"]
    if constraint:
        command += ["--constraint", constraint]
    if beside:  # the requirements are there
        command += ["--no-deps", "--force-reinstall"]
    subprocess.run([*command, f"{package}[{','.join(extras)}]" if extras else package], check=True)


def run(python: Path, arguments: Sequence[str], folder: Path) -> str:
    """Runs a command in the folder, without the clone on its path. Returns what it printed."""
    settings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    settings["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def attempt(
    package: Path,
    chain: Sequence[str] = CHAIN,
    *,
    extras: Sequence[str] = (),
    constraint: Path | None = None,
    beside: bool = False,
) -> dict[str, str]:
    """Installs one package, with extras, and runs the chain, or the start of it. Returns what each command printed.

    Raises:
        SystemExit: a command failed, or odtk was not the installed one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        python = environment(Path(temporary) / "environment", beside=beside)
        constraint = constraint and constraint.resolve()
        install(python, package.resolve(), extras=extras, constraint=constraint, beside=beside)
        folder = Path(temporary) / "work"
        folder.mkdir()
        found = run(python, ["-c", WHERE], folder).strip()
        if not Path(found).is_relative_to(Path(temporary) / "environment"):
            raise SystemExit(f"{package.name}: {found} is imported, not the package that was installed.")
        printed = {}
        for line in chain:
            command = line.partition(" ")[0]
            started = time.monotonic()
            printed[command] = run(python.with_name("odtk"), line.split(), folder)
            print(f"{package.name}: odtk {command}, {time.monotonic() - started:.0f} s", flush=True)
        results = folder / "detections.json"
        if "infer" in printed and not isinstance(json.loads(results.read_text()), list):
            raise SystemExit(f"{package.name}: {results.name} is not a list of detections.")
    return printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="wheels and sdists")
    parser.add_argument("--extras", nargs="+", default=(), help="extras to install with each")
    parser.add_argument("--constraint", type=Path, help="versions of the requirements, as pip takes them")
    parser.add_argument("--beside", action="store_true", help="use this environment's packages as the requirements")
    args = parser.parse_args()
    for package in args.packages:
        printed = attempt(package, extras=args.extras, constraint=args.constraint, beside=args.beside)
        print(f"{package.name}: the whole chain runs. odtk info:\n{printed['info']}")


if __name__ == "__main__":
    main()
