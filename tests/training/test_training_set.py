"""What a run trains on, read once: what is validated on of it is scored as the file itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from odtk.data import coco as module
from odtk.data.coco import load_json
from odtk.evaluation.evaluate import evaluate
from odtk.training.training_set import TrainingSet


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "json"])
def test_images_set_aside_are_scored_as_in_the_file(coco: Path, monkeypatch, typed: bool) -> None:
    """Areas are those of the file, not of the boxes, and crowds stay crowds."""
    if not typed:
        monkeypatch.setattr(module, "decode", lambda text: None)
    path = coco / "truth.json"
    content = load_json(path)
    more = {"image_id": 2, "category_id": 3}
    content["annotations"] += [
        {**more, "id": 7, "bbox": [30, 4, 30, 30], "area": 2000, "iscrowd": 1},
        {**more, "id": 8, "bbox": [2, 2, 10.5, 10], "area": 5000.5},
        {**more, "id": 9, "bbox": [20, 20, 20, 20], "area": None},
    ]
    path.write_text(json.dumps(content))
    source = TrainingSet(str(path), None, rotated=False, skip_damaged=False)
    assert [image.id for image in source.dataset.images] == [1, 2]
    assert source.dataset.images[1].boxes.shape == (3, 4), "a crowd is not learned"
    held_out = source.content_of([2])
    assert [image["id"] for image in held_out["images"]] == [2]
    found = [(entry["id"], entry["bbox"], bool(entry.get("iscrowd"))) for entry in held_out["annotations"]]
    assert found == [
        (2, [4, 4, 40, 40], False),
        (7, [30, 4, 30, 30], True),
        (8, [2, 2, 10.5, 10], False),
        (9, [20, 20, 20, 20], False),
    ]
    detections = [
        {"image_id": 2, "category_id": 3, "bbox": box, "score": score}
        for box, score in (([2, 2, 10, 10], 0.9), ([31, 5, 20, 20], 0.8), ([20, 20, 19, 19], 0.7))
    ]
    alone = [entry for entry in content["annotations"] if entry["image_id"] == 2]
    wanted = evaluate(detections, {**content, "images": content["images"][1:], "annotations": alone})
    assert evaluate(detections, held_out) == wanted
    assert wanted.stats[4] > 0 and wanted.stats[3] > 0, "of the areas that are stated, one is medium"


def test_it_is_read_when_it_is_asked_for_and_its_annotations_can_be_forgotten(coco: Path) -> None:
    source = TrainingSet(str(coco / "none.json"), None, rotated=False, skip_damaged=False)
    with pytest.raises(module.OdtkError, match="does not exist"):
        source.annotations  # noqa: B018
    source = TrainingSet(str(coco / "truth.json"), None, rotated=False, skip_damaged=False)
    dataset = source.dataset
    (coco / "truth.json").unlink()
    assert len(source.annotations.content["images"]) == 2
    source.forget()
    source.forget()
    assert source.dataset is dataset and "annotations" not in vars(source)
