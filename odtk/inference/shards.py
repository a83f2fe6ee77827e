"""Detections as Parquet files: one row for each, readable by every tool that reads Parquet.

While a run works, each rank writes what it finds into shards, whole or not at all, so a run that is killed loses the
last SHARD_SECONDS. Columns: image_id, category_id, category (its name), score, and x, y, w, h (and theta) as in COCO
results, but not rounded. A shard is sorted by image, and in an image by descending score; its metadata say which part
of the run's work it holds (Shard), and its name ends in the hash of its content, so no damage goes unseen.

merged() reads any number of shards in the order of the images, and holds few of their rows at a time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..categories import Category, to_pairs
from ..config import OdtkError
from ..files import atomic_write, file_hash, os_error_reason
from .collect import Part, select
from .detect import Rows, coco_results, joined, order_of

SUFFIX = ".parquet"
SHARD_ROWS = 50_000  # after so many, or
SHARD_SECONDS = 30.0  # so long, a shard is written
GROUP_ROWS = 2_000  # of a row group, the least that is read of a file
WINDOW_ROWS = 20_000  # about as many are merged at a time
OPEN_FILES = 64
HASH_DIGITS = 16  # of the SHA-256 of a shard, in its name
META = b"odtk"  # the key of our metadata in a file
BOX = ("x", "y", "w", "h", "theta")


@dataclass(frozen=True)
class Shard:
    """A part of the work of one rank.

    Attributes:
        rank: whose.
        first, end: the parts of its work (collect.Part) from ``first`` on, before ``end``.
        images: in them.
        found: images with at least one detection.
        rows: detections.
        damaged: ids of the images that could not be decoded.
        path: of the file.
    """

    rank: int
    first: int
    end: int
    images: int
    found: int
    rows: int
    damaged: list[int]
    path: Path


def parquet(path: str | Path = "") -> Any:
    """The module pyarrow.parquet.

    Raises:
        OdtkError: it is not installed, or not for the NumPy that is.
    """
    try:
        import pyarrow.parquet
    except (ImportError, AttributeError) as error:
        what = f"{path} is Parquet, which" if path else "Parquet"
        raise OdtkError(f"{what} needs the package pyarrow: pip install 'odtk[scale]'.") from error
    return pyarrow.parquet


def has_parquet() -> bool:
    """Whether pyarrow is there and works: one that was built for another NumPy is found, but cannot be imported."""
    try:
        parquet()
    except OdtkError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes the parts of one rank's work into a folder.

    Args:
        first: number of the first part to come.
        categories: in the order of the class indices.
        width: numbers of a box, 4 or 5.
    """

    def __init__(self, folder: Path, rank: int, first: int, categories: Sequence[Category], width: int) -> None:
        self.folder, self.rank, self.first, self.end = folder, rank, first, first
        self.categories, self.width = categories, width
        self.written: list[Shard] = []
        self.parts: list[Part] = []
        self.rows = 0
        self.since = time.monotonic()

    def add(self, part: Part) -> None:
        """Takes the next part; writes a shard if it is time.

        Raises:
            OdtkError: the disk is full, for instance.
        """
        self.parts.append(part)
        self.end += 1
        self.rows += len(part.rows[0])
        if self.rows >= SHARD_ROWS or time.monotonic() - self.since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        if not self.parts:
            return
        found = [part.rows for part in self.parts if len(part.rows[0])]
        ids, rows = joined(found) if found else (np.zeros(0, np.int64), np.zeros((0, 2 + self.width)))
        shard = Shard(
            self.rank,
            self.first,
            self.end,
            images=sum(len(part.ids) for part in self.parts),
            found=len(np.unique(ids)),
            rows=len(ids),
            damaged=[id for part in self.parts for id in part.damaged],
            path=self.folder,
        )
        about = {name: value for name, value in asdict(shard).items() if name != "path"}
        content = io.BytesIO()
        with ParquetFile(content, self.categories, self.width, about) as writer:
            writer.write(select((ids, rows), order_of(ids, rows)))
        digest = hashlib.sha256(content.getbuffer()).hexdigest()[:HASH_DIGITS]
        path = self.folder / f"{self.rank:05}-{self.first:09}-{self.end:09}-{digest}{SUFFIX}"
        with atomic_write(path) as file:
            file.write(content.getbuffer())
        self.written.append(replace(shard, path=path))
        self.parts.clear()
        self.first, self.rows, self.since = self.end, 0, time.monotonic()


class ParquetFile:
    """A Parquet file of detections that is being written.

    Args:
        about: what our metadata say beside the categories.
    """

    def __init__(self, file: IO[bytes], categories: Sequence[Category], width: int, about: dict[str, Any]) -> None:
        pq = parquet()
        import pyarrow as pa

        name = pa.dictionary(pa.int32(), pa.string())
        columns = [("image_id", pa.int64()), ("category_id", pa.int64()), ("category", name), ("score", pa.float64())]
        columns += [(side, pa.float64()) for side in BOX[:width]]
        meta = {"categories": to_pairs(categories), **about}
        self.schema = pa.schema(columns, metadata={META: json.dumps(meta).encode()})
        self.ids = np.array([category.id for category in categories], dtype=np.int64)
        self.names = pa.array([category.name for category in categories], pa.string())
        self.writer = pq.ParquetWriter(file, self.schema, compression="zstd", write_page_checksum=True)

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def write(self, found: Rows) -> None:
        """Adds rows, which come by ascending image id over all calls."""
        import pyarrow as pa

        image_ids, rows = found
        label = rows[:, 0].astype(np.int32)
        names = pa.DictionaryArray.from_arrays(pa.array(label, pa.int32()), self.names)
        columns = [image_ids, self.ids[label], names, rows[:, 1], *rows[:, 2:].T]
        self.writer.write_table(pa.table(columns, schema=self.schema), row_group_size=GROUP_ROWS)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def metadata(path: Path) -> dict[str, Any]:
    """What we wrote into a file.

    Raises:
        OdtkError: it cannot be read, or is not ours.
    """
    pq = parquet(path)
    try:
        content = pq.read_metadata(path).metadata or {}
        return dict(json.loads(content[META]))
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:  # an ArrowInvalid is a ValueError
        reason = f"it lacks the metadata of odtk's {error}" if isinstance(error, KeyError) else str(error)
        raise OdtkError(f"{path} does not hold detections of `odtk infer`: {reason}.") from None


def categories_in(path: Path) -> tuple[Category, ...]:
    """The categories of a file, in the order of the class indices."""
    return tuple(Category(id, name) for id, name in metadata(path)["categories"])


def shards_of(folder: Path, rank: int) -> list[Shard]:
    """The shards of a rank up to the first gap: all its work from the start on, each part of it once.

    Each is read once; one that is damaged ends them: its part is done again.
    """
    found: list[Shard] = []
    end = 0
    for path in sorted(folder.glob(f"{rank:05}-*{SUFFIX}")):
        try:
            check_whole(path)
            about = metadata(path)
            about.pop("categories")
            shard = Shard(**about, path=path)
        except (OdtkError, TypeError, KeyError):
            continue
        if shard.first == end:
            found.append(shard)
            end = shard.end
    return found


def check_whole(path: Path) -> None:
    """Checks that a shard holds what was written, by the hash in its name; one without (of 0.3 before its release) is
    read, group by group.

    Raises:
        OdtkError: it does not.
    """
    with reading(path):
        parts = path.name.removesuffix(SUFFIX).split("-")
        if len(parts) > 3:
            if file_hash(path)[:HASH_DIGITS] != parts[3]:
                raise ValueError("its content has changed")
            return
        file = open_parquet(path)
        for group in range(file.num_row_groups):
            file.read_row_group(group)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Names the file in which something cannot be read.

    Raises:
        OdtkError: something cannot.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, MemoryError) as error:
        raise OdtkError(f"{path} is damaged ({os_error_reason(error)}): run `odtk infer` again.") from error


def open_parquet(path: Path) -> Any:
    """A file whose pages are compared with their checksums as they are read, where it has some."""
    return parquet(path).ParquetFile(path, page_checksum_verification=True)


def merged(paths: Sequence[Path]) -> Iterator[Rows]:
    """The rows of shards with the same categories, by image and in an image as they stand; an image is in one window.

    Row groups are read in the order of their first images, and what no later one can precede is given: with images in
    the order of their ids, few row groups are held at a time, else one of each shard.

    Raises:
        OdtkError: one is damaged.
    """
    pq = parquet(paths[0] if paths else "")
    opened = functools.lru_cache(OPEN_FILES)(open_parquet)

    labels = {category.id: label for label, category in enumerate(categories_in(paths[0]))} if paths else {}
    held: list[Rows] = []
    count, limit = 0, WINDOW_ROWS
    for first, path, group in sorted(row_groups(pq, paths)):
        if count >= limit:
            rows = joined(held)
            rows = select(rows, np.argsort(rows[0], kind="stable"))
            ready = int(np.searchsorted(rows[0], first))
            if ready:
                yield rows[0][:ready], rows[1][:ready]
            held = [(rows[0][ready:], rows[1][ready:])]
            count -= ready
            limit = WINDOW_ROWS + 2 * count
        with reading(path):
            held.append(rows_of(opened(path).read_row_group(group), labels))
        count += len(held[-1][0])
    if count:
        rows = joined(held)
        yield select(rows, np.argsort(rows[0], kind="stable"))


def row_groups(pq: Any, paths: Sequence[Path]) -> Iterator[tuple[int, Path, int]]:
    """The first image, the file and the number of each row group with rows."""
    for path in paths:
        with reading(path):
            about = pq.read_metadata(path)
            groups = [about.row_group(number) for number in range(about.num_row_groups)]
            firsts = [group.column(0).statistics.min if group.num_rows else None for group in groups]
        yield from ((first, path, number) for number, first in enumerate(firsts) if first is not None)


def rows_of(table: Any, labels: dict[int, int]) -> Rows:
    """A table as detect.detection_rows has them; ``labels`` maps a category id to its class index."""
    ids = table.column("category_id").to_numpy()
    known, place = np.unique(ids, return_inverse=True)
    label = np.array([labels[id] for id in known.tolist()], dtype=np.float64)[place]
    numbers = [table.column(name).to_numpy() for name in ("score", *BOX) if name in table.column_names]
    return table.column("image_id").to_numpy(), np.stack([label, *numbers], axis=1)


def shards_in(folder: Path) -> list[Shard]:
    """The shards of all ranks."""
    ranks = sorted({int(file.name[:5]) for file in folder.glob(f"{'[0-9]' * 5}-*{SUFFIX}")})
    return [shard for rank in ranks for shard in shards_of(folder, rank)]


def images_done(path: str | Path) -> int | None:
    """The images that shards know of, with detections or without: a folder of shards, or one; None for another file.

    Raises:
        OdtkError: it cannot be read, or is not ours.
    """
    place = Path(path)
    if place.is_dir():
        return sum(shard.images for shard in shards_in(place))
    return metadata(place).get("images") if place.suffix == SUFFIX else None


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The COCO results in a Parquet file, or in the shards of a run that has not ended (the folder OUTPUT.parts).

    Raises:
        OdtkError: it cannot be read, or is not ours.
    """
    place = Path(path)
    paths = [place]
    if place.is_dir():
        paths = [shard.path for shard in shards_in(place)]
        if not paths:
            raise OdtkError(f"The folder {path} holds no detections: no shards of `odtk infer` are in it.")
    categories = categories_in(paths[0])
    return [result for window in merged(paths) for result in coco_results(*window, categories)]
