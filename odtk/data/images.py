"""One image file: its header, its pixels, and the rules for unusual kinds. Files are only read.

Every kind of image becomes 8-bit RGB by one of these rules:

  grayscale   the gray value is used for R, G and B
  CMYK        converted by Pillow's formula (R = 255 − min(255, C + K)), inverted Adobe files too
  palette     each index becomes its palette color
  alpha       the alpha channel is dropped, the color under it is kept
  16-bit      the high byte is kept
  animation   the first frame is used
  EXIF        turned or not as coco.py decides by the annotated size

A truncated file is refused before the run starts; damage that shows only while decoding raises ``ImageError``.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image as PILImage

EXTENSIONS = {
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
# What Pillow may take a file for, whatever its name says. Others start programs (EPS: Ghostscript) or are no photos.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
LARGE = 25_000_000  # pixels: from here on images are decoded one at a time, as each takes a multiple of 3 bytes a pixel
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}  # what a whole file of a format ends with
FIRST_BYTES, HEAD_BYTES, TAIL_BYTES = 1 << 12, 1 << 16, 1 << 12  # of a file that are looked at first
EXIF_ORIENTATION = 0x0112  # the tag
PNG_BIT_DEPTH_AT = 24  # offset in the file: signature 8, chunk length 4, "IHDR" 4, width 4, height 4

# EXIF orientation (2…8) → how Pillow shows the image upright; 1 and unknown values change nothing.
UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
SWAPS_SIDES = {5, 6, 7, 8}
FLOATS = "its pixels are floats, whose range is not known"

_one_large_image = threading.Lock()


class ImageError(Exception):
    """An image file that cannot be used; the message is the reason, without the file's name."""


class MissingImage(ImageError):
    """An image file that does not exist."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems and tools keep for themselves: ._a.jpg (macOS), .thumbnails …"""
    return name.startswith(".") or name == "@eaDir"  # of Synology's storage


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden(os.path.basename(name))


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and those below it, sorted; links to folders are followed, hidden folders are not."""
    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        found += [Path(place, name) for name in names if is_image(name)]
        below = {os.path.realpath(os.path.join(place, name)): name for name in folders if not is_hidden(name)}
        folders[:] = [name for target, name in below.items() if target not in seen]  # a circle of links ends
        seen.update(below)
    return sorted(found)


@dataclass(frozen=True)
class Header:
    """What an image file says about itself before it is decoded.

    Attributes:
        width, height: of the stored raster in pixels, before any turn by EXIF.
        orientation: EXIF orientation 1…8; 1 is upright.
        plain: an 8-bit RGB or grayscale JPEG or PNG below LARGE pixels, which every decoder reads alike.
        rule: the rule by which this kind of image becomes 8-bit RGB; empty where none is needed.
    """

    width: int
    height: int
    orientation: int
    plain: bool
    rule: str


def read_header(source: Path | BinaryIO) -> Header:
    """The size, orientation and kind of an image, without decoding it.

    Args:
        source: a path, or an open file.

    Raises:
        MissingImage: the file does not exist.
        ImageError: it is empty, truncated (JPEG and PNG) or not an image of a known format.
    """
    try:
        if isinstance(source, Path) and not stat.S_ISREG(os.stat(source).st_mode):  # nobody may write to a pipe
            raise ImageError("it is no regular file")
        with open(source, "rb") if isinstance(source, Path) else nullcontext(source) as file, open_image(file) as image:
            if image.format in END_MARKS:
                _check_end_of_file(file, image.format)
            if image.mode == "F":
                raise ImageError(FLOATS)
            depth = _bit_depth(file, image)
            plain = (
                image.format in ("JPEG", "MPO", "PNG")
                and image.mode in ("RGB", "L")
                and depth == 8
                and "transparency" not in image.info
                and image.width * image.height < LARGE
            )
            return Header(*image.size, _orientation(image), plain, _rule(image, depth))
    except FileNotFoundError:
        raise MissingImage("the file is missing") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise almost any exception on damaged files
        raise ImageError(_reason(error)) from error


def open_image(source: Path | BinaryIO) -> PILImage.Image:
    """An image file of one of FORMATS, whose pixels are not read yet; raises what Pillow raises."""
    PILImage.init()
    return PILImage.open(source, formats=[name for name in FORMATS if name in PILImage.OPEN])


def decode(path: Path | BinaryIO, orientation: int = 1) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, 3] RGB, turned by the given EXIF orientation.

    Raises:
        ImageError: the file cannot be decoded completely.
    """
    try:
        with open_image(path) as image:
            large = image.width * image.height >= LARGE
            with _one_large_image if large else nullcontext():
                rgb = to_rgb(image)
                if orientation in UPRIGHT:
                    rgb = rgb.transpose(UPRIGHT[orientation])
                return np.array(rgb)
    except Exception as error:
        raise ImageError(_reason(error)) from error


def decode_content(content: bytes) -> np.ndarray:
    """The pixels of an image file's content, uint8 [H, W, 3] RGB, turned by its own EXIF orientation.

    Raises:
        ImageError: it is not an image of a known format, or damaged.
    """
    try:
        with open_image(io.BytesIO(content)) as image:
            kind, orientation = image.format or "", _orientation(image)
    except Exception as error:
        raise ImageError(_reason(error)) from error
    _check_end(content, kind)
    return decode(io.BytesIO(content), orientation)


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """An image of any kind as 8-bit RGB, by the rules above.

    Raises:
        ImageError: no rule fits.
    """
    if image.mode == "F":
        raise ImageError(FLOATS)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips to white
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        image = PILImage.fromarray(high_byte)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _orientation(image: PILImage.Image) -> int:
    # Pillow turns TIFF itself. A PNG may have EXIF after its pixels, where getexif() would decode the whole image.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    return orientation if orientation in UPRIGHT else 1


def _bit_depth(file: BinaryIO, image: PILImage.Image) -> int:
    if image.format == "PNG":
        file.seek(PNG_BIT_DEPTH_AT)
        return file.read(1)[0]
    return 16 if image.mode.startswith("I") else 8


def _rule(image: PILImage.Image, depth: int) -> str:
    """The sentence of the rule that applies to an image of ``depth`` bits per channel."""
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "animation: the first frame is used"
    if image.mode == "CMYK":
        return "CMYK image converted to RGB"
    if image.mode in ("P", "PA"):
        return "palette image: each index becomes its color"
    if image.mode in ("RGBA", "LA", "RGBa", "La") or "transparency" in image.info:
        return "alpha channel dropped"
    if depth == 16:
        return "16-bit image: the high byte is kept"
    if image.mode in ("L", "1"):
        return "grayscale image: the gray value is used for R, G and B"
    return ""


def _check_end_of_file(file: BinaryIO, kind: str) -> None:
    """As _check_end, of a JPEG or PNG file, of which mostly only both ends are read.

    Not by mmap: a file that shrinks while it is mapped ends the process (SIGBUS).
    """
    size = file.seek(0, io.SEEK_END)
    for amount in (FIRST_BYTES, HEAD_BYTES):  # mostly a little is enough, which matters to a file on another machine
        file.seek(0)
        head = file.read(amount)
        if size > amount + TAIL_BYTES and (kind == "PNG" or _start_of_scan(head) < len(head)):
            file.seek(size - TAIL_BYTES)
            if END_MARKS[kind] in file.read(TAIL_BYTES):
                return
    file.seek(0)
    _check_end(file.read(), kind)


def _check_end(data: bytes, kind: str) -> None:
    """Refuses a JPEG without its end-of-image marker and a PNG without its last chunk."""
    if kind not in END_MARKS:
        return
    # In a JPEG, bytes may follow the end marker (maker notes, padding), and a thumbnail before the scan has one.
    after = 0 if kind == "PNG" else _start_of_scan(data)
    if data.rfind(END_MARKS[kind]) <= after:
        raise ImageError("the file is truncated: its end is missing")


def _start_of_scan(data: bytes) -> int:
    """Offset of a JPEG's first start-of-scan marker (ITU-T T.81, annex B.1); the file's length where there is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)


def _reason(error: Exception) -> str:
    """The sentence for an exception of Pillow."""
    unidentified = isinstance(error, PILImage.UnidentifiedImageError)
    text = "not an image of a known format" if unidentified else str(error)
    return f"the image cannot be read ({text or type(error).__name__})"
