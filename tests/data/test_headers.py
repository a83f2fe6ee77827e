"""The cache of image headers saves reading, and can do nothing else: each way to break it gives the same headers."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from odtk.data import headers
from odtk.data.headers import HeaderCache, read_headers
from odtk.data.images import Header, ImageError

COUNT = headers.MIN_FILES


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "odtk" / "headers"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Images that were changed an hour ago; the first is gray, the last one damaged."""
    folder = tmp_path / "images"
    folder.mkdir()
    found = [folder / f"{i}.png" for i in range(COUNT)]
    for i, path in enumerate(found):
        Image.new("L" if i == 0 else "RGB", (8 + i, 6)).save(path)
        os.utime(path, ns=(0, time.time_ns() - 3600 * 10**9))
    found[-1].write_bytes(b"no image")
    return found


@pytest.fixture
def opened(monkeypatch) -> Iterator[list[str]]:
    """The names of the files whose headers are read."""
    read, names = headers.read_header, []

    def note(path: Path) -> Header:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(headers, "read_header", note)
    yield names


def sizes(found: list[Header | ImageError]) -> list[int | str]:
    return [str(header) if isinstance(header, ImageError) else header.width for header in found]


def test_a_second_start_reads_only_what_changed(paths, cache, opened) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    first = read_headers(paths)
    assert len(opened) == COUNT and isinstance(first[-1], ImageError) and len(list(cache.iterdir())) == 1
    opened.clear()
    second = read_headers(paths)
    assert second[:-1] == first[:-1] and str(second[-1]) == str(first[-1])
    assert opened == [paths[-1].name]  # what cannot be read may be mended, or was a failure of the storage
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths} == before
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)  # nothing beside the images

    Image.new("RGB", (99, 6)).save(paths[3])
    os.utime(paths[4], ns=(0, 5))
    paths[5].unlink()
    opened.clear()
    third = read_headers(paths)
    assert sorted(opened) == sorted(paths[i].name for i in (3, 4, 5, -1))
    assert sizes(third)[3:6] == [99, 12, "the file is missing"]


def test_a_file_changed_a_moment_ago_is_read_again(paths, cache, opened) -> None:
    os.utime(paths[2])
    read_headers(paths)
    opened.clear()
    read_headers(paths)
    assert paths[2].name in opened and paths[1].name not in opened


def test_a_few_files_make_no_cache(paths, cache) -> None:
    read_headers(paths[: COUNT - 1])
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "folder", "version"])
def test_a_damaged_cache_changes_nothing(paths, cache, opened, damage, monkeypatch) -> None:
    first = sizes(read_headers(paths))
    (file,) = cache.iterdir()
    content = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "version":
        monkeypatch.setattr(headers, "VERSION", "later")
    else:
        at = content.index(bytes([8, 6, 1])) if damage == "flipped" else 0  # width, height, orientation
        file.write_bytes(
            {
                "empty": b"",
                "cut": content[:-5],
                "flipped": content[:at] + b"\x09" + content[at + 1 :],
                "text": b"x" * 1000,
            }[damage]
        )
    opened.clear()
    assert sizes(read_headers(paths)) == first and len(opened) == COUNT
    opened.clear()
    assert sizes(read_headers(paths)) == first
    assert len(opened) == (COUNT if damage == "folder" else 1)  # the damaged cache was replaced


@pytest.mark.parametrize("problem", ["file in the way", "no home", "full disk"])
def test_where_no_cache_can_be_written_the_headers_are_read(paths, cache, opened, problem, monkeypatch) -> None:
    if problem == "file in the way":
        cache.parents[1].write_text("mine")
    elif problem == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    else:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        opened.clear()
        assert sizes(read_headers(paths))[:3] == [8, 9, 10]
        assert len(opened) == COUNT
    if problem == "full disk":
        assert list(cache.iterdir()) == []
    if problem == "file in the way":
        assert cache.parents[1].read_text() == "mine"


def test_a_relative_cache_home_is_ignored_as_its_specification_says(paths, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read_headers(paths)
    assert not (tmp_path / "here").exists() and len(list((tmp_path / "home/.cache/odtk/headers").iterdir())) == 1


def test_two_runs_at_once_leave_one_whole_cache(paths, cache, opened) -> None:
    first = sizes(read_headers(paths))
    (file,) = cache.iterdir()
    file.unlink()
    threads = [threading.Thread(target=lambda: read_headers(paths)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(cache.iterdir()) == [file]
    opened.clear()
    assert sizes(read_headers(paths)) == first and opened == [paths[-1].name]


def test_a_part_of_a_folder_keeps_what_is_known_of_the_others(paths, cache, opened) -> None:
    more = [path.with_name(f"more{path.name}") for path in paths[:-1]]
    for source, path in zip(paths, more, strict=False):
        os.link(source, path)
    read_headers(paths)
    read_headers([*more, paths[0]])
    opened.clear()
    read_headers([*paths, *more])
    assert opened == [paths[-1].name]


def test_names_that_are_no_text_are_read_each_time(paths, cache, opened) -> None:
    odd = Path(os.fsdecode(os.fsencode(paths[1].parent) + b"/\xff.png"))
    paths[1].rename(odd)
    for _ in range(2):
        opened.clear()
        assert sizes(read_headers([odd, *paths]))[:2] == [9, 8]
    assert sorted(opened) == sorted([odd.name, paths[1].name, paths[-1].name])  # renamed: missing under its old name


def test_cache_files_that_nobody_used_are_removed(paths, cache, monkeypatch) -> None:
    cache.mkdir(parents=True)
    for name, days in (("old", headers.UNUSED_DAYS + 1), ("young", 1)):
        (cache / name).write_bytes(b"")
        os.utime(cache / name, (0, time.time() - days * 86_400))
    read_headers(paths)
    assert not (cache / "old").exists() and (cache / "young").exists()
    (file,) = (path for path in cache.iterdir() if path.name != "young")
    os.utime(file, (0, 0))
    read_headers(paths)  # reads it: it is in use
    assert file.stat().st_mtime > time.time() - 60
    monkeypatch.setattr(headers, "MAX_FILES", 5)
    paths[0].write_bytes(paths[1].read_bytes())
    os.utime(paths[0], (0, 9))
    read_headers(paths)
    assert set(HeaderCache(f"{paths[0].parent}/").known) == {paths[0].name}


def test_long_reading_is_said(paths, cache, capsys, monkeypatch) -> None:
    monkeypatch.setattr(headers, "SAID_AFTER", 0.0)
    read_headers(paths)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"Reading the headers of {COUNT} images, which takes about" in said
