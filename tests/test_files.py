"""Files are written whole or not at all, and what cannot be written is refused."""

import os
from pathlib import Path

import pytest

from odtk import files
from odtk.config import OdtkError


def test_a_device_needs_no_folder_to_write_in(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to(tmp_path / "other" / "out.json")
    writable = {str(tmp_path / "pipe"), str(tmp_path / "other")}  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) in writable)
    files.check_writable(str(tmp_path / "pipe"))
    with pytest.raises(OdtkError, match="no permission to write in"):
        files.check_writable(str(tmp_path / "out.json"))
    with pytest.raises(OdtkError, match=r"other does not exist"):
        files.check_writable(str(tmp_path / "link.json"))
    (tmp_path / "other").mkdir()
    files.check_writable(str(tmp_path / "link.json"))  # what is replaced is where the link leads
    writable.clear()
    with pytest.raises(OdtkError, match="pipe: no permission"):
        files.check_writable(str(tmp_path / "pipe"))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    path = tmp_path / "out.json"
    path.write_text("[1]")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OdtkError, match="No space left on device"):
        files.write_json([2], str(path))
    assert path.read_text() == "[1]" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_device_is_written_to_and_not_replaced() -> None:
    with pytest.raises(OdtkError, match="/dev/full: No space left on device"):
        files.write_json([1], "/dev/full")
    assert not os.path.isfile("/dev/full")
