"""Images by folder, file and pattern."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, features

from odtk.config import OdtkError
from odtk.data.dataset import read
from odtk.data.listing import list_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.png", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("")
        else:
            Image.new("RGB", (8, 6)).save(tmp_path / name, "PNG")
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_folders_files_and_patterns(folder: Path) -> None:
    def found(*sources: str) -> list[str]:
        return names(list_images([str(folder / source) for source in sources]), folder)

    assert names(list_images(folder), folder) == found(".") == ["a.JPG", "b.png", "sub/c.png"]
    assert found("b.png", "a.JPG") == ["b.png", "a.JPG"]  # in the order given
    assert found("*.png") == ["b.png"] and found("**/*.png") == ["b.png", "sub/c.png"]
    assert found("sub", ".") == ["sub/c.png", "a.JPG", "b.png"]  # each once
    assert found("notes.txt") == ["notes.txt"]  # named expressly: its kind is looked at, not its suffix
    assert found("*") == ["a.JPG", "b.png"]

    (folder / "._b.png").write_bytes(b"macOS")
    (folder / "folder.png").mkdir()
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "b.png").touch()
    assert found(".") == ["a.JPG", "b.png", "sub/c.png"] and found("*") == ["a.JPG", "b.png"]


def test_links_to_folders_are_followed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "d.jfif").touch()
    (other / "back").symlink_to(folder)  # a circle
    (folder / "linked").symlink_to(other)
    assert names(list_images(folder), folder) == ["a.JPG", "b.png", "linked/d.jfif", "sub/c.png"]


def test_a_folder_of_tar_files_says_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").touch()
    with pytest.raises(OdtkError, match=rf"has no images \(.*\); of its tar files, pass {tmp_path}/\*\.tar\."):
        list_images(tmp_path)


def test_a_name_with_brackets_is_a_name(folder: Path) -> None:
    os.rename(folder / "b.png", folder / "b[1].png")
    assert names(list_images(str(folder / "b[1].png")), folder) == ["b[1].png"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "nowhere does not exist"),
        ("sub/*.jpg", r"No image matches .*sub/\*\.jpg"),
        ("empty", "has no images"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, source: str, words: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(OdtkError, match=words):
        list_images(str(folder / source))


def test_images_of_a_list_are_numbered_from_one(folder: Path) -> None:
    images = read(None, [str(folder / "sub"), str(folder / "*.png")]).images
    assert [(image.id, image.path.name, image.width) for image in images] == [(1, "c.png", 8), (2, "b.png", 8)]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(folder: Path) -> None:
    Image.new("RGB", (16, 12), (250, 10, 10)).save(folder / "d.avif")
    [image] = [image for image in read(None, folder).images if image.path.suffix == ".avif"]
    assert (image.width, image.height) == (16, 12)
    assert image.decode()[6, 8].tolist() == pytest.approx([250, 10, 10], abs=12)
