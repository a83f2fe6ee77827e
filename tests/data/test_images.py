"""Image files: the formats that are opened, and large images."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from odtk.data import images
from odtk.data.images import FORMATS, ImageError, decode, decode_content, read_header

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 moveto 9 9 lineto stroke\nshowpage\n"


def test_a_file_of_another_format_is_refused_and_starts_no_program(tmp_path: Path, monkeypatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", started)  # how Pillow starts Ghostscript
    path = tmp_path / "a.jpg"
    path.write_bytes(EPS)
    for read in (read_header, decode):
        with pytest.raises(ImageError, match="not an image of a known format"):
            read(path)
    with pytest.raises(ImageError, match="not an image of a known format"):
        decode_content(EPS)


def test_every_format_that_is_promised_is_opened(tmp_path: Path) -> None:
    PILImage.init()
    picture = PILImage.effect_noise((24, 16), 60).convert("RGB")
    for name in FORMATS:
        if name not in PILImage.SAVE:
            continue  # a Pillow built without it
        path = tmp_path / f"picture.{name.lower()}"
        picture.save(path, "JPEG" if name == "MPO" else name)
        assert (read_header(path).width, read_header(path).height) == (24, 16)
        assert decode(path).shape == (16, 24, 3)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "LARGE", 1000)
    running, most = 0, {"large": 0, "small": 0}
    guard = threading.Lock()

    def slow(image: PILImage.Image) -> PILImage.Image:
        nonlocal running
        with guard:
            running += 1
            kind = "large" if image.width * image.height >= 1000 else "small"
            most[kind] = max(most[kind], running)
        time.sleep(0.05)
        with guard:
            running -= 1
        return image.convert("RGB")

    monkeypatch.setattr(images, "to_rgb", slow)
    for kind, side in (("large", 40), ("small", 20)):
        path = tmp_path / f"{kind}.png"
        PILImage.new("RGB", (side, side)).save(path)
        assert read_header(path).plain == (kind == "small"), "DALI decodes none that is large"
        threads = [threading.Thread(target=decode, args=(path,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most["large"] == 1 and most["small"] > 1


def test_pixels_are_those_of_pillow(tmp_path: Path) -> None:
    picture = PILImage.effect_noise((24, 16), 60).convert("RGB")
    picture.save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png"), np.asarray(picture))
    assert np.array_equal(decode(tmp_path / "a.png", 6), np.rot90(np.asarray(picture), -1))


def test_what_is_no_regular_file_or_of_floats_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # nobody writes to it: opening it would wait forever
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(ImageError, match="it is no regular file"):
            read_header(tmp_path / name)
    PILImage.new("F", (4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="its pixels are floats"):
        read_header(tmp_path / "a.tif")


def test_a_file_that_shrinks_while_its_header_is_read_ends_no_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from odtk.data import images

path, check = Path(sys.argv[1]), images._check_end
def shrink_first(data, kind):
    path.write_bytes(b"")
    check(data, kind)
images._check_end = shrink_first
print(images.read_header(path).width)
"""
    path = tmp_path / "a.jpg"
    PILImage.effect_noise((300, 200), 60).save(path)
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "300\n"), run.stderr


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_both_ends_of_a_large_file_tell_whether_it_is_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    exif = PILImage.Exif()
    exif[0x010E] = "\xff\xd8\xff\xd9" * 500  # as of a thumbnail before the scan
    PILImage.effect_noise((500, 400), 80).convert("RGB").save(path, quality=95, exif=exif)
    whole = path.read_bytes()
    assert len(whole) > 2 * images.HEAD_BYTES
    for padding in (0, 100, images.TAIL_BYTES - 1, images.TAIL_BYTES, 3 * images.TAIL_BYTES):
        path.write_bytes(whole + bytes(padding))
        assert read_header(path).width == 500
    for cut in (len(whole) - 12, len(whole) // 2, images.HEAD_BYTES + images.TAIL_BYTES + 1, images.HEAD_BYTES):
        path.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match="truncated"):
            read_header(path)
