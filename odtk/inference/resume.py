"""A run that goes on where an earlier one was killed: OUTPUT.parts/, beside the output.

It holds the shards of every rank (shards.py) and run.json, which says what the run was: the model's hash, its images
with the sizes and times of their files, and every setting that detections depend on. A run that is not the same is
refused with the difference. As the images of a batch depend on the number of processes and on --batch, these belong to
it. The folder is removed when the outputs are written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..categories import Category, to_pairs
from ..config import InferConfig, LoaderConfig, OdtkError
from ..data.records import Image
from ..files import atomic_write, file_hash, locked, make_folder, os_error_reason
from ..ranks import CpuGroup, gather
from ..text import in_words, plural
from .backends import Backend
from .collect import Collector, Memory, Part, Total
from .detect import Rows
from .served import is_address
from .shards import SUFFIX, ShardWriter, has_parquet, merged, shards_of

RUN = "run.json"
MANY = 1000  # images: a run of so many should be able to go on
STREAMS = re.compile(r"/dev/(?!shm/)|/proc/")  # paths that may lead to a file which is open elsewhere
SHARED_SECONDS = 5.0  # after which a file that one machine wrote is seen on the others, where they share the folder
Run = dict[str, Any]  # what a run is: a flag or a word → its value


def describe_run(
    config: InferConfig,
    data: LoaderConfig,
    backend: Backend,
    categories: Sequence[Category],
    images: Sequence[Image],
    mended: Collection[int] = (),
) -> Run:
    """All that the detections of a run depend on, by the flag that sets it, or by a word.

    Args:
        data: as the loader gets it.
        categories: in the order of the class indices.
        mended: ids of images whose files may have changed.
    """
    thresholds = {f"--{name.replace('_', '-')}": v for name, v in dataclasses.asdict(backend.thresholds).items()}
    if is_address(config.path):
        assert backend.metadata is not None  # a served model has some
        model = f"{config.path} {backend.metadata.model}"
    else:
        model = file_hash(config.path)
    return {
        "model": model,
        "images": digest_of(images, set(mended)),
        "categories": to_pairs(categories),
        "version of odtk": __version__,
        "device": data.device.partition(":")[0],
        "number of processes": data.world,
        "--batch": data.batch * data.world,
        "--loader": data.loader,
        "precision": backend.precision,
        "--size": data.size,
        "--resize": data.resize,
        "--max-size": data.max_size,
        "--tiles": config.tiles and config.tiles.size,
        "--overlap": config.tiles and config.tiles.overlap,
        **thresholds,
    }


def digest_of(images: Sequence[Image], mended: Collection[int]) -> str:
    """Changes with the images or their files, those of ``mended`` apart. It does not with the folder that all local
    files are in: that may have moved, if it has kept their times."""
    local = [str(image.path) for image in images if image.member is None or image.member.file.is_local]
    root = os.path.commonprefix(local).rpartition("/")[0]
    digest = hashlib.sha256()
    for image in images:
        path = str(image.path)
        if image.member is None or image.member.file.is_local:
            path = path[len(root) :]
        about = (image.id, path, image.width, image.height, image.orientation)
        digest.update(repr((*about, *(() if image.id in mended else image.state()))).encode())
    return digest.hexdigest()


def difference(earlier: Run, now: Run) -> str:
    """In which two runs differ, for a message; empty if they do not."""
    found = []
    for name in dict.fromkeys((*earlier, *now)):
        old, new = (json.loads(json.dumps(run.get(name))) for run in (earlier, now))  # tuples become lists
        if old != new:
            other = name in ("model", "images", "categories")  # whose values say nothing to a reader
            found.append(f"another {name}" if other else f"{name} {in_words(old)} and not {in_words(new)}")
    return ", ".join(found).replace("another images", "other images").replace("another categories", "other categories")


@contextlib.contextmanager
def open_collector(
    config: InferConfig,
    run: Callable[[Collection[int]], Run],
    categories: Sequence[Category],
    *,
    width: int,
    total: int,
    ranks: CpuGroup,
    log: Callable[[str], None],
) -> Iterator[Collector]:
    """What the detections of a run are given to; every rank calls this.

    Shards, where an output is a file and pyarrow can be imported; otherwise, or where the machines of a run do not
    share the folder of the output, memory.

    Args:
        run: describe_run of this run, of ``mended``, which rank 0 calls.
        width: numbers of a box, 4 or 5.
        total: images of all ranks.
        log: takes what the user should know.

    Raises:
        OdtkError: there are detections of a run that was another one, another process writes this output, or the
            folder cannot be written.
    """
    files = [path for path in config.output if os.path.isfile(path) or not os.path.exists(path)]
    output = next((path for path in files if not STREAMS.match(os.path.abspath(path))), None)
    if output is None:
        yield Memory(total, ranks.group)
        return
    if not has_parquet():
        if total >= MANY:
            log(
                "Detections stay in memory until the end, as pyarrow cannot be imported (pip install 'odtk[scale]'): "
                "this run cannot go on after it was killed."
            )
        yield Memory(total, ranks.group)
        return
    folder = Path(f"{os.path.realpath(output) if os.path.islink(output) else output}.parts")  # beside the file
    with locked(folder, log) if ranks.rank == 0 else contextlib.nullcontext():
        token = ranks.from_first(lambda: prepare(folder, run, override=config.override))
        if ranks.all_max(int(not is_seen(folder, token)))[0]:
            log(f"The machines do not share the folder of {output}: detections stay in memory until the end.")
            if ranks.rank == 0 and not any(folder.glob(f"*{SUFFIX}")):
                shutil.rmtree(folder, ignore_errors=True)
            yield Memory(total, ranks.group)
            return
        collector = Shards(folder, run, categories, width, total, ranks, strict=not config.data.skip_damaged)
        done = sum(gather(collector.images, ranks.group))
        if done:
            log(f"Going on with {folder}: {done} of {plural(total, 'image')} are done.")
        yield collector


def prepare(folder: Path, run: Callable[[Collection[int]], Run], *, override: bool) -> str:
    """Makes the folder, or checks that what is in it is of the same run; returns a text that is new in its run.json.

    Args:
        run: as open_collector has it.
        override: detections of another run are removed.

    Raises:
        OdtkError: they are of another run, or the folder is not ours.
    """
    now: Run | None = None
    mended: list[int] = []
    if folder.exists():
        try:
            about = json.loads((folder / RUN).read_text())
            earlier = about["run"]
            if not override:
                mended = list(about.get("mended", ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if not folder.is_dir() or any(folder.iterdir()):
                raise OdtkError(f"{folder} is not of `odtk infer`: move it, or give another --output.") from None
            earlier = None  # it was killed before it wrote anything
        now = run(mended)
        differs = "" if earlier is None else difference(earlier, now)
        if differs and not override:
            raise OdtkError(
                f"{folder} holds the detections of a run that did not end, with {differs}: start that run again to go "
                "on with it, or give --override to begin anew."
            )
        if override:
            clear(folder)
    make_folder(str(folder))
    token = secrets.token_hex(8)
    write_run(folder, token=token, run=now or run(mended), mended=mended)
    return token


def write_run(folder: Path, **content: Any) -> None:
    with atomic_write(folder / RUN) as file:
        file.write(json.dumps(content).encode())


def is_seen(folder: Path, token: str) -> bool:
    """Whether this machine sees the folder that rank 0 made."""
    until = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / RUN).read_text()).get("token") == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def clear(folder: Path) -> None:
    """Removes what odtk wrote into the folder, and the folder if nothing else is in it.

    Raises:
        OdtkError: there is no permission.
    """
    try:
        for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.*.tmp"), folder / RUN]:
            path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise OdtkError(f"{folder} could not be removed ({os_error_reason(error)}): remove it yourself.") from error


class Shards:
    """A Collector that writes shards into a folder, after those that an earlier run has written.

    Args:
        run: as open_collector has it.
        strict: damaged images are not accepted, so the work from the first of them on is done again.
    """

    def __init__(
        self,
        folder: Path,
        run: Callable[[Collection[int]], Run],
        categories: Sequence[Category],
        width: int,
        total: int,
        ranks: CpuGroup,
        *,
        strict: bool,
    ) -> None:
        self.folder, self.run, self.total, self.ranks, self.strict = folder, run, total, ranks, strict
        self.earlier = shards_of(folder, ranks.rank)
        if strict:
            clean = [not shard.damaged for shard in self.earlier]
            self.earlier = self.earlier[: clean.index(False) if False in clean else None]
        self.units = self.earlier[-1].end if self.earlier else 0
        self.images = sum(shard.images for shard in self.earlier)
        self.writer = ShardWriter(folder, ranks.rank, self.units, categories, width)
        self.paths: list[Path] = []

    def add(self, part: Part) -> None:
        self.writer.add(part)

    def finish(self) -> Total | None:
        self.writer.flush()
        # Only what the ranks name: a process that outlives a killed run for a moment may write another shard.
        shards = [shard for of in gather([*self.earlier, *self.writer.written], self.ranks.group) for shard in of]
        if self.ranks.rank:
            return None
        images = sum(shard.images for shard in shards)
        if images != self.total:
            raise RuntimeError(f"{images} instead of {self.total} images went through the model.")
        self.paths = [shard.path for shard in shards]
        damaged = sorted(id for shard in shards for id in shard.damaged)
        if damaged and self.strict:
            self.let_mend(damaged)
        return Total(sum(shard.rows for shard in shards), sum(shard.found for shard in shards), damaged)

    def let_mend(self, damaged: list[int]) -> None:
        """Has run.json say that these images, of which the user is told, may be others when the run goes on."""
        about = json.loads((self.folder / RUN).read_text())
        if not difference(about["run"], self.run(about["mended"])):  # otherwise others have changed too
            about["mended"] = sorted({*about["mended"], *damaged})
            write_run(self.folder, **{**about, "run": self.run(about["mended"])})

    def windows(self) -> Iterator[Rows]:
        return merged(self.paths)

    def remove(self) -> None:
        clear(self.folder)
