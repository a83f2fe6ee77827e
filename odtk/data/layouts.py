"""What a path given as annotations means: which format, which split, and where its images are.

A path is one of

  a COCO JSON            of any tool; Label Studio's backslashes and absolute paths of another machine are understood
  a YOLO data.yaml       yolo.py
  a folder               that has a data.yaml, one COCO JSON (Roboflow's _annotations.coco.json, Label Studio's
                         result.json, CVAT's annotations/instances_default.json …) or XML files of Pascal VOC (voc.py)

Some hold several splits: a data.yaml, VOC's own layout, a folder with train/ and valid/ of Roboflow, or one with
train.json and val.json. PATH:SPLIT names one (data.yaml:val). Without it the split is train, and where something is
measured (validation, infer, evaluate, export --verify) it is val: with_split. Where there is only one split, it is
taken; only --val-annotations insists on val, as nothing should be validated by mistake on what was learned.

Images are looked for beside the annotations and in the usual places: find_images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from ..config import OdtkError
from . import voc, yolo
from .coco import load_boxes, load_json
from .tars import TarSet, tar_sources

SAMPLE = 100  # image names that are looked up in each place
ROBOFLOW = "_annotations.coco.json"
WHOLE = (ROBOFLOW, "result.json", "annotations/instances_default.json", "instances_default.json")


class Annotations(NamedTuple):
    """Annotations that have been read.

    Attributes:
        content: as load_json returns it.
        images: the folder that the file names are relative to.
        path: of the file or folder that was read.
        tars: the tar files that the images are in, if they are; ``images`` is their name then.
    """

    content: dict[str, Any]
    images: Path
    path: Path
    tars: TarSet | None = None


@dataclass(frozen=True)
class Source:
    """Where annotations are: a path, its format (coco, yolo or voc), and the split to read if it holds several."""

    path: Path
    format: str
    split: str | None = None


def load_annotations(
    annotations: str | Path,
    images: str | Path | Sequence[str] | None = None,
    *,
    rotated: bool | None = None,
    boxes_only: bool = False,
) -> Annotations:
    """Reads annotations of any format, as the content of a COCO file.

    Args:
        annotations: PATH or PATH:SPLIT.
        images: folder of the images, also in a list of one, or tar files (tars.py); None looks for a folder.
        rotated: whether YOLO's four corners are rotated boxes; None: they are if the labels look like it.
        boxes_only: nothing else is needed (coco.load_boxes), which makes large COCO files much quicker to read.

    Raises:
        OdtkError: there is nothing that can be read, or several things of which one must be named.
    """
    source = find_source(annotations)
    if images is not None and (tars := tar_sources(images)):
        if source.format != "coco":
            raise OdtkError(f"{annotations}: images in tar files need COCO JSON, which `odtk convert` writes.")
        content = (load_boxes if boxes_only else load_json)(source.path)
        return Annotations(content, Path(tars[0]), source.path, TarSet(tars))
    if images is not None and not isinstance(images, (str, Path)):
        (images,) = images
    folder = None if images is None else Path(images).expanduser()
    if source.format == "yolo":
        content, folder = yolo.load(source.path, source.split or "train", folder, rotated=rotated)
    elif source.format == "voc":
        content, folder = voc.load(source.path, source.split, folder)
    else:
        content = (load_boxes if boxes_only else load_json)(source.path)
        names = [entry["file_name"] for entry in content["images"] if isinstance(entry.get("file_name"), str)]
        folder = folder or find_images(source.path, names)
        for entry in content["images"]:
            if isinstance(entry.get("file_name"), str) and is_foreign(entry["file_name"]):
                entry["file_name"] = locate(folder, entry["file_name"]) or entry["file_name"]
    return Annotations(content, folder, source.path)


def image_folder(annotations: str | Path, otherwise: str | None = None) -> str:
    """The folder of the images of some annotations.

    Args:
        otherwise: what is returned where none of the images is found; None: the folder in which they should be.
    """
    source = find_source(annotations)
    if source.format == "yolo":  # whose sizes and labels take as long to read as there are images
        try:
            return str(yolo.find_images(yolo.read_yaml(source.path), source.path, source.split or "train")[1])
        except OdtkError:
            if otherwise is None:
                raise
            return otherwise
    content, folder, _, _ = load_annotations(annotations, boxes_only=True)
    if otherwise is None:
        return str(folder)
    names = [entry["file_name"] for entry in content["images"] if isinstance(entry.get("file_name"), str)]
    return str(folder) if any(locate(folder, name) for name in sampled(names)) else otherwise


def with_split(annotations: str, split: str, *, strict: bool = False) -> str:
    """The annotations with a split named, if they hold several (``strict``: or one) and none is named yet."""
    path, named = parse(annotations)
    found = sources(path)
    return annotations if named or None in found or (len(found) == 1 and not strict) else f"{annotations}:{split}"


def parse(annotations: str | Path) -> tuple[Path, str | None]:
    """PATH or PATH:SPLIT → the path, and the split if one is named; valid and validation mean val."""
    text = os.path.expanduser(annotations)
    path, colon, split = text.rpartition(":")
    meant = next((name for name, names in yolo.SPLITS.items() if split in names), None)
    if colon and meant and not os.path.exists(text):
        return Path(path), meant
    return Path(text), None


def find_source(annotations: str | Path) -> Source:
    """What a PATH or PATH:SPLIT means.

    Raises:
        OdtkError: it has no such split, or nothing that can be read.
    """
    path, split = parse(annotations)
    found = sources(path)
    if None in found:
        if split:
            raise OdtkError(f"{path} is not divided into splits: give it without :{split}.")
        return found[None]
    wanted = split or (next(iter(found)) if len(found) == 1 else "train")
    if wanted not in found:
        named = " or ".join(f"{path}:{name}" for name in found)
        raise OdtkError(f"{path} has no split {wanted!r}: give {named}." if found else f"{path} has no splits.")
    return found[wanted]


def sources(path: Path) -> dict[str | None, Source]:
    """What a path holds, by split; undivided it is under None. A missing file is taken for a COCO JSON.

    Raises:
        OdtkError: a folder without annotations, or with several that are not splits.
    """
    if path.suffix.lower() in (".yaml", ".yml") and os.path.isfile(path):
        return {split: Source(path, "yolo", split) for split in yolo.splits_of(yolo.read_yaml(path))}
    if path.suffix.lower() == ".xml":
        raise OdtkError(f"{path} is one image's annotation: give the folder of the XML files.")
    if not os.path.isdir(path):
        return {None: Source(path, "coco")}
    yamls = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if os.path.isfile(path / name)]
    if yamls:
        return sources(yamls[0])
    for name in WHOLE:
        if os.path.isfile(path / name):
            return {None: Source(path / name, "coco")}
    if (path / voc.LISTS).is_dir() and (splits := voc.splits_of(path)):
        return {split: Source(path, "voc", split) for split in splits}
    if voc.is_voc(path):
        return {None: Source(path, "voc")}
    return split_folders(path) or split_files(path)


def split_folders(path: Path) -> dict[str | None, Source]:
    """Folders of splits, as Roboflow writes them: train/, valid/ and test/."""
    found: dict[str | None, Source] = {}
    for split, names in yolo.SPLITS.items():
        for folder in (path / name for name in names):
            if os.path.isfile(folder / ROBOFLOW):
                found[split] = Source(folder / ROBOFLOW, "coco")
            elif voc.is_voc(folder):
                found[split] = Source(folder, "voc")
    return found


def split_files(path: Path) -> dict[str | None, Source]:
    """The JSON files of a folder or of its annotations/: one, or one per split (train.json, instances_val2017.json)."""
    files = sorted([*path.glob("*.json"), *(path / "annotations").glob("*.json")])
    if len(files) == 1:
        return {None: Source(files[0], "coco")}
    found: dict[str | None, Source] = {}
    for split, names in yolo.SPLITS.items():
        own = [file for file in files if file.stem.removeprefix("instances_").rstrip("0123456789") in names]
        if len(own) == 1:
            found[split] = Source(own[0], "coco")
    if not found and files:
        raise OdtkError(f"The folder {path} has several JSON files, {files[0].name}, {files[1].name} …: name one.")
    if not found:
        raise OdtkError(f"The folder {path} has no annotations: no COCO JSON, no data.yaml and no XML file.")
    return found


def find_images(path: Path, names: list[str]) -> Path:
    """The folder in which most of the images of a COCO file are; the file's own where none is found.

    Args:
        path: of the COCO file.
        names: of the images in it.
    """
    names = sampled(names)
    here, above = path.parent, path.parent.parent
    if here == above:  # "." or "/"
        above = here / ".."
    own = dict.fromkeys((path.stem, path.stem.removeprefix("instances_")))
    places = [here, here / "images", above / "images", here / "JPEGImages", above / "JPEGImages"]
    places += [place / name for name in own for place in (here, here / "images", above / "images", above)]
    places += [above / here.name / "images", above / "images" / here.name, above]
    best, most = here, 0
    for place in places:
        if os.path.isdir(place) and (count := sum(bool(locate(place, name)) for name in names)) > most:
            best, most = place, count
    return best


def sampled(names: list[str]) -> list[str]:
    """About SAMPLE of the names, evenly spread."""
    return names[:: max(1, len(names) // SAMPLE)]


def locate(folder: Path, name: str) -> str | None:
    """The name under which an image is in a folder, or None where it is not there.

    A name with backslashes or with the folders of another machine is shortened from the left until it is found.
    """
    if os.path.isfile(folder / name):
        return name
    if not is_foreign(name):
        return None
    given = PureWindowsPath(name)  # which knows both slashes
    parts = given.parts[1:] if given.anchor else given.parts
    shorter = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((short for short in shorter if os.path.isfile(folder / short)), None)


def is_foreign(name: str) -> bool:
    """Whether a file name has backslashes or leads out of its folder, as on the machine where it was written."""
    return "\\" in name or name.startswith(("/", "..")) or name[1:2] == ":"
