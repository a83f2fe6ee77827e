"""`make release-check`: every fault of a release is found, and nothing else."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from release import check

METADATA = "Metadata-Version: 2.4\nName: odtk\nVersion: {}\n"


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "tag.gpgSign=false", "-c", "commit.gpgSign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a package odtk 1.2.3 that may be released; its files are in dist/."""
    root = tmp_path / "clone"
    (root / "odtk").mkdir(parents=True)
    (root / "odtk" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-11-24)\n- All.\n\n## 1.2.2 (unreleased)\n")
    (root / ".gitignore").write_text("dist/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "All")
    git(root, "tag", "-a", "v1.2.3", "-m", "All")
    (root / "dist").mkdir()
    wheel(root, "py3-none-any")
    wheel(root, "cp311-cp311-manylinux_2_34_x86_64", "odtk/_C.so")
    with tarfile.open(root / "dist" / "odtk-1.2.3.tar.gz", "w:gz") as archive:
        (tmp_path / "PKG-INFO").write_text(METADATA.format("1.2.3"))
        archive.add(tmp_path / "PKG-INFO", "odtk-1.2.3/PKG-INFO")
        archive.add(root / "odtk", "odtk-1.2.3/odtk")
    return root


def wheel(root: Path, tag: str, *more: str, version: str = "1.2.3") -> None:
    """Writes a wheel of the clone's sources, with further empty files."""
    with zipfile.ZipFile(root / "dist" / f"odtk-1.2.3-{tag}.whl", "w") as archive:
        archive.write(root / "odtk" / "__init__.py", "odtk/__init__.py")
        archive.writestr("odtk-1.2.3.dist-info/METADATA", METADATA.format(version))
        for name in more:
            archive.writestr(name, "")


def faults(root: Path) -> list[str]:
    return [
        *check.tree_faults(root),
        *check.tag_faults(root),
        *check.changelog_faults(root),
        *check.file_faults(root, root / "dist"),
    ]


def test_a_good_release_has_no_fault_and_gets_its_hashes(clone: Path) -> None:
    assert faults(clone) == []
    check.write_sums(clone / "dist")
    assert faults(clone) == []  # the hashes are no package
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=clone / "dist", check=True)
    name = "odtk-1.2.3.tar.gz"
    digest = hashlib.sha256((clone / "dist" / name).read_bytes()).hexdigest()
    assert f"{digest}  {name}" in (clone / "dist" / "SHA256SUMS").read_text().splitlines()


def test_a_changed_tree_is_found(clone: Path) -> None:
    (clone / "more.txt").write_text("")
    assert len(faults(clone)) == 1 and "more.txt" in faults(clone)[0]


@pytest.mark.parametrize("kind", ["none", "light", "elsewhere"])
def test_a_missing_tag_is_found(clone: Path, kind: str) -> None:
    if kind == "elsewhere":  # one commit behind
        git(clone, "commit", "-q", "--allow-empty", "-m", "More")
    else:
        git(clone, "tag", "-d", "v1.2.3")
        if kind == "light":
            git(clone, "tag", "v1.2.3")
    assert len(faults(clone)) == 1 and "git tag -s v1.2.3" in faults(clone)[0]


@pytest.mark.parametrize("heading", ["1.2.3 (unreleased)", "1.2.4 (2026-11-24)", "1.2.3"])
def test_a_changelog_without_the_version_and_its_date_is_found(clone: Path, heading: str) -> None:
    text = (clone / "CHANGELOG.md").read_text()
    (clone / "CHANGELOG.md").write_text(text.replace("1.2.3 (2026-11-24)", heading))
    assert heading in check.changelog_faults(clone)[0]


def test_files_that_do_not_fit_are_found(clone: Path) -> None:
    dist = clone / "dist"
    wheel(clone, "py3-none-any", "odtk/_C.so")
    assert "contradict" in check.file_faults(clone, dist)[0]
    wheel(clone, "py3-none-any", "odtk/removed.py")
    assert "odtk/removed.py" in check.file_faults(clone, dist)[0]
    wheel(clone, "py3-none-any", version="1.2.2")
    assert "says that it is 1.2.2" in check.file_faults(clone, dist)[0]
    wheel(clone, "py3-none-any")
    wheel(clone, "cp311-cp311-linux_x86_64", "odtk/_C.so")
    assert "not manylinux" in check.file_faults(clone, dist)[0]
    (dist / "odtk-1.2.3-cp311-cp311-linux_x86_64.whl").rename(dist / "odtk-1.2.2-cp311-cp311-manylinux_2_34_x86_64.whl")
    assert "does not belong" in check.file_faults(clone, dist)[0]
    for file in dist.iterdir():
        file.unlink()
    assert len(check.file_faults(clone, dist)) == 2


def test_other_sources_are_found(clone: Path) -> None:
    (clone / "odtk" / "__init__.py").write_text('__version__ = "1.2.3"\nMORE = 1\n')
    assert [fault.partition(" was built from other sources")[1] != "" for fault in faults(clone)[1:]] == [True] * 3


@pytest.mark.parametrize(
    ("license", "permissive"),
    [
        ("MIT License", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", True),
        ("MPL-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("Apache Software License; GNU General Public License v3 or later (GPLv3+)", False),
        ("MIT AND LGPL-2.1-only", False),
        ("AGPL-3.0", False),
        ("UNKNOWN", False),
        ("LicenseRef-NVIDIA-Proprietary", False),
    ],
)
def test_which_licenses_are_permitted(license: str, permissive: bool) -> None:
    assert check.is_permissive(license) is permissive


def test_the_licenses_of_what_odtk_needs_are_permitted(capsys) -> None:
    assert check.license_faults() == []
    needed, missing = check.closure(set())
    assert {"torch", "onnx", "numpy", "sympy"} <= needed and not missing & {"torch", "onnx"}
    assert f"{len(needed)} that odtk needs" in capsys.readouterr().out
