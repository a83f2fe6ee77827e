"""The quick way through COCO annotations (data/table.py) gives what the slow one gives, to the bit and to the word."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from odtk.config import OdtkError
from odtk.data import coco as rules
from odtk.data import table
from odtk.data.coco import load_boxes, load_json
from odtk.data.dataset import Dataset, read

SIZE = (40, 30)  # width, height
# Values that some rule fixes or refuses, or that the typed decoder does not take.
ODD: list[Any] = [None, True, 7.0, 5.5, -3, 0, -0.0, 99, 2**53 + 1, 2**63, 2**70, 10**310, 1e308, float("nan"), "7", []]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        PILImage.new("RGB", SIZE, (200, 40, 90)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_bytes(b"")  # damaged
    return tmp_path


def annotations(generator: random.Random, count: int, rotated: bool) -> dict[str, Any]:
    """Random boxes, most of them plain; their images and categories are not in the order of their ids."""
    entries = []
    for i in range(count):
        box = [generator.uniform(0, 30), generator.randint(0, 20), generator.uniform(0.5, 20), generator.randint(1, 12)]
        if rotated and generator.random() < 0.9:
            box.append(generator.uniform(-3, 3))
        of = {"image_id": generator.choice([30, 10, 20, 40]), "category_id": generator.choice([9, 4, 6])}
        entries.append({"id": i, "bbox": box, "area": 3.5, **of})
    return {
        "images": [
            {"id": id, "file_name": f"{i}.jpg", "width": SIZE[0], "height": SIZE[1]}
            for i, id in enumerate((30, 10, 20, 40))
        ],
        "annotations": entries,
        "categories": [{"id": id, "name": f"ç{id}"} for id in (6, 9, 4)],
    }


def mutate(generator: random.Random, content: dict[str, Any]) -> None:
    entry = generator.choice(content["annotations"] * 3 + content["images"] + content["categories"])
    key = generator.choice([*entry, "bbox", "iscrowd", "id"])
    odd = generator.choice(ODD)
    what = generator.random()
    if what < 0.1:
        entry.pop(key, None)
    elif what < 0.2 and "bbox" in entry:
        entry["id"] = generator.choice([3, 5, "a"])
    elif isinstance(entry.get(key), list) and entry[key] and what < 0.9:
        entry[key][generator.randrange(len(entry[key]))] = odd
    else:
        entry[key] = odd


def outcome(path: Path, rotated: bool) -> Any:
    """All that a dataset is: everything that a run can see of it."""
    try:
        dataset = read(path, path.parent, rotated=rotated, training=True)
    except OdtkError as error:
        return str(error)
    images = [
        (i.id, i.path, i.boxes.tobytes(), i.boxes.shape, i.boxes.dtype, i.labels.tolist()) for i in dataset.images
    ]
    return images, dataset.categories, dataset.faults


@pytest.mark.parametrize("rotated", [False, True])
def test_both_ways_give_the_same_dataset_and_the_same_faults(folder, rotated, monkeypatch) -> None:
    generator, quick, ways = random.Random(rotated), table.decode, [0, 0]
    path = folder / "annotations.json"
    for _ in range(120):
        content = annotations(generator, generator.choice([1, 40]), rotated)
        for _ in range(generator.randint(0, 3)):
            mutate(generator, content)
        path.write_text(json.dumps(content))
        ways[quick(path.read_text()) is None] += 1
        monkeypatch.setattr(rules, "decode", quick)
        found = outcome(path, rotated)
        monkeypatch.setattr(rules, "decode", lambda text: None)
        assert found == outcome(path, rotated), path.read_text()
    assert min(ways) > 20  # both ways were taken


def test_a_clean_box_costs_no_dictionary(folder, monkeypatch) -> None:
    content = annotations(random.Random(0), 300, rotated=False)
    for entry in content["annotations"]:
        entry["bbox"] = [1, 1.5, 20, 20]
        entry["image_id"] = 30
    content["annotations"][7]["bbox"][0] = -5
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    asked: list[Any] = []
    make = table.AnnotationTable.__getitem__

    def note(self: table.AnnotationTable, index: Any) -> Any:
        asked.append(index)
        return make(self, index)

    monkeypatch.setattr(table.AnnotationTable, "__getitem__", note)
    dataset = read(path, folder)
    assert asked == [7]  # the one that is clipped
    assert dataset.images[0].boxes.shape == (300, 4) and dataset.images[0].boxes[7].tolist() == [0, 1.5, 15, 20]
    assert dataset.images[0].boxes.base is not None  # a part of one array


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"images": {}}', '{"images": [], "annotations": [1]}', '{"images": []} x', "[" * 200_000]
)
def test_what_the_typed_decoder_refuses_is_named_by_the_slow_way(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(OdtkError) as quick:
        load_boxes(path)
    with pytest.raises(OdtkError) as slow:
        load_json(path)
    assert str(quick.value) == str(slow.value)


def test_a_byte_order_mark_and_other_keys_are_read_quickly(tmp_path) -> None:
    path = tmp_path / "x.json"
    text = '{"info": {"year": [1, {"a": "é"}]}, "images": [{"id": 1, "file_name": "é.jpg", "flickr": "x"}]}'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    content = load_boxes(path)
    assert isinstance(content["annotations"], table.AnnotationTable) and len(content["annotations"]) == 0
    assert content["images"][0]["file_name"] == "é.jpg"


def test_a_large_turn_or_a_center_outside_is_no_plain_row(folder) -> None:
    content = annotations(random.Random(1), 3, rotated=True)
    boxes = [[5, 5, 10, 6, 0.5], [38, 5, 10, 6, 1.0], [5, 5, 10, 6, 2 * math.pi]]
    for entry, box in zip(content["annotations"], boxes, strict=True):
        entry |= {"bbox": box, "image_id": 30}
    (folder / "annotations.json").write_text(json.dumps(content))
    dataset = Dataset.load(folder / "annotations.json", folder, rotated=True, skip_damaged=True)
    assert np.array_equal(dataset.images[0].boxes, [boxes[0], boxes[2]])
