"""Pascal VOC datasets: one XML file per image, read as the content of a COCO file.

Either a folder of XML files, with the images beside them or in a usual place, or VOC's own layout: Annotations/,
JPEGImages/ and optionally ImageSets/Main/SPLIT.txt, which lists the names of a split.

  bndbox     xmin, ymin, xmax and ymax are the first and the last pixel of the object, counted from 1 (VOC devkit,
             VOC2012, section 3.3), so the box reaches from (xmin − 1, ymin − 1) to (xmax, ymax)
  difficult  not used in training and ignored in scoring, as in VOC's own: COCO's iscrowd

Images are numbered from 1 in the order of their names, categories in the order of theirs; the categories are those of
all XML files, also of those that a split leaves out, so that the splits agree.

What cannot be read becomes an entry that says so in ``unreadable``, which the rules of coco.py refuse.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from ..config import OdtkError
from .images import EXTENSIONS

LISTS = Path("ImageSets") / "Main"
EXTRAS = ("difficult", "truncated", "occluded")  # 0 or 1
NUMBERS = ("xmin", "ymin", "xmax", "ymax")
LINE = "line"  # attribute of an element: the line of its file where it starts


def is_voc(folder: Path) -> bool:
    """Whether a folder holds XML files, or VOC's own folder of them."""
    return any(folder.glob("*.xml")) or any((folder / "Annotations").glob("*.xml"))


def splits_of(folder: Path) -> list[str]:
    """The splits that a dataset in VOC's own layout lists."""
    return [split for split in ("train", "val", "test") if os.path.isfile(folder / LISTS / f"{split}.txt")]


def load(folder: Path, split: str | None = None, images: Path | None = None) -> tuple[dict[str, Any], Path]:
    """A VOC dataset, as load_json returns a COCO file's content, and the folder of its images.

    Args:
        split: one of splits_of; None takes every XML file.
        images: folder of the images; None looks in the usual places.

    Raises:
        OdtkError: no XML file, or a list of a split that cannot be read or names an XML file that does not exist.
    """
    own = folder / "Annotations"
    top = own if any(own.glob("*.xml")) else folder
    files = {file.relative_to(top).with_suffix("").as_posix(): file for file in sorted(top.rglob("*.xml"))}
    if not files:
        raise OdtkError(f"The folder {folder} has no annotations of Pascal VOC: no XML file.")
    trees = {name: parse(file) for name, file in files.items()}
    roots = [tree for tree in trees.values() if not isinstance(tree, str)]
    names = sorted({text_of(one, "name") for root in roots for one in root.findall("object")} - {""})
    wanted = list(files) if split is None else read_split(folder / LISTS / f"{split}.txt", files)
    stated = {name: image_name(trees[name], name) for name in wanted}
    places = [images] if images else [top, folder / "JPEGImages", folder / "images", top.parent / "JPEGImages"]
    places += [] if images else [top.parent / "images", top.parent, folder.parent / "images"]
    found = max(places, key=lambda place: sum(bool(find_image(place, stated[name], name)) for name in wanted[:100]))
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": id, "name": name} for id, name in enumerate(names, start=1)],
    }
    ids = {name: id for id, name in enumerate(names, start=1)}
    for name in wanted:
        add_image(content, trees[name], str(files[name]), find_image(found, stated[name], name) or stated[name], ids)
    content["images"].sort(key=lambda image: image.get("file_name") or "")
    numbers = {image["id"]: number for number, image in enumerate(content["images"], start=1)}
    content["annotations"].sort(key=lambda entry: numbers[entry["image_id"]])
    for entry in content["images"]:
        entry["id"] = numbers[entry["id"]]
    for number, entry in enumerate(content["annotations"], start=1):
        entry |= {"id": number, "image_id": numbers[entry["image_id"]]}
    return content, found


def read_split(path: Path, files: dict[str, Path]) -> list[str]:
    """The names that a list of a split holds, one per line; VOC's lists per class have a second column."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OdtkError(f"The list of images {path} cannot be read: {error}.") from None
    names = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = line.strip() if line.strip() in files else line.split()[0]
        if name not in files:
            raise OdtkError(f"{path}, line {number}: there is no annotation file {name}.xml.")
        names.append(name)
    return list(dict.fromkeys(names))


def parse(path: Path) -> ElementTree.Element | str:
    """The root of an XML file, whose elements have their line as an attribute; or why it cannot be read.

    A document type is refused, because its entities can grow without bound or read other files.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise ValueError("it declares a document type, which is not read for safety: remove the line <!DOCTYPE")

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, {LINE: str(parser.CurrentLineNumber)})

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.buffer_text = True
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except expat.ExpatError as error:
        return f"it is not valid XML: {expat.ErrorString(error.code)} at line {error.lineno}, column {error.offset + 1}"
    except (ValueError, LookupError) as error:  # an unknown encoding is a LookupError
        return str(error)
    root = builder.close()
    return root if root.tag == "annotation" else f"its root is <{root.tag}>, not the <annotation> of Pascal VOC"


def text_of(element: ElementTree.Element, tag: str) -> str:
    """The text of a child, or an empty string."""
    return (element.findtext(tag) or "").strip()


def image_name(tree: ElementTree.Element | str, name: str) -> str:
    """The file name of an image as its XML states it, else by the XML's own name."""
    stated = "" if isinstance(tree, str) else text_of(tree, "filename")
    return stated.replace("\\", "/") or f"{name}.jpg"


def find_image(folder: Path, stated: str, name: str) -> str | None:
    """The image in a folder by its stated name or by that of its XML file (which Roboflow and renaming leave alone).

    Args:
        stated: what <filename> says.
        name: of the XML file, without its suffix, relative to the top of the annotations.
    """
    beside = f"{os.path.dirname(name)}/{stated}".lstrip("/")
    suffixes = (os.path.splitext(stated)[1], ".jpg", ".jpeg", ".png", ".JPG")
    candidates = [beside, stated, os.path.basename(stated), *(name + suffix for suffix in suffixes)]
    pictures = [file for file in candidates if os.path.splitext(file)[1].lower() in EXTENSIONS]
    return next((file for file in pictures if os.path.isfile(folder / file)), None)


def add_image(
    content: dict[str, Any], tree: ElementTree.Element | str, file: str, name: str, ids: dict[str, int]
) -> None:
    """Appends what one XML file says of its image and of its objects.

    Args:
        file: its path.
        name: of the image in its folder.
        ids: of the categories by name.
    """
    id = len(content["images"]) + 1
    image: dict[str, Any] = {"id": id, "file_name": name, "source": file}
    content["images"].append(image)
    if isinstance(tree, str):
        image["unreadable"] = tree
        return
    size = tree.find("size")
    if size is not None:
        for side in ("width", "height"):
            text = text_of(size, side)
            if text.isascii() and text.isdecimal() and len(text) < 10 and int(text):  # some tools write 0
                image[side] = int(text)
    for one in tree.findall("object"):
        entry: dict[str, Any] = {"image_id": id, "source": f"{file}, line {one.get(LINE)}", "iscrowd": 0}
        content["annotations"].append(entry)
        category = text_of(one, "name")
        box = read_box(one)
        if not category:
            entry["unreadable"] = "its object has no <name>"
        elif isinstance(box, str):
            entry["unreadable"] = box
        else:
            entry |= {"category_id": ids[category], "bbox": box, "area": box[2] * box[3]}
        entry |= {key: 1 for key in EXTRAS if text_of(one, key) == "1"}
        entry["iscrowd"] = entry.get("difficult", 0)


def read_box(one: ElementTree.Element) -> list[float] | str:
    """The box [x, y, w, h] of an object in pixels, or why there is none."""
    box = one.find("bndbox")
    if box is None:
        turned = one.find("robndbox") is not None
        return "its box is rotated (<robndbox>), which is not read" if turned else "its object has no <bndbox>"
    values = []
    for key in NUMBERS:
        text = text_of(box, key)
        try:
            values.append(float(text))
        except ValueError:
            return f"its <bndbox> has no number <{key}>" if not text else f"its <{key}> {text!r} is not a number"
    return [values[0] - 1, values[1] - 1, values[2] - values[0] + 1, values[3] - values[1] + 1]
