"""`odtk infer` and `odtk evaluate` on one dataset in three formats."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image as PILImage

from odtk.categories import Category
from odtk.cli import main
from odtk.config import ModelConfig
from odtk.data.convert import convert
from tests.random_models import detector_of, save

NAMES = ("1.jpg", "2.jpg", "3.jpg")


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """A COCO file whose ids are those that YOLO and VOC give too."""
    (tmp_path / "images").mkdir()
    content = {
        "images": [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(NAMES, start=1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 2 * i + c, "image_id": i, "category_id": c, "bbox": [5 * i, 4 * c, 20 + i, 18]}
            for i in (1, 2, 3)
            for c in (1, 2)
        ],
    }
    for name in NAMES:
        PILImage.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "images" / name)
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return tmp_path / "truth.json"


@pytest.mark.slow
def test_the_same_set_gives_the_same_figures_in_every_format(truth: Path, tmp_path: Path, capsys) -> None:
    model = save(
        detector_of(ModelConfig(backbones=("ResNet18FPN",), classes=2)),
        tmp_path,
        [Category(1, "cat"), Category(2, "dog")],
    )
    for to in ("yolo", "voc"):
        convert(str(truth), str(tmp_path / to), to)
    common = ["--devices", "cpu", "--loader", "torch", "--size", "64", "64", "--detections", "20"]
    results, figures = [], []
    for annotations in (truth, tmp_path / "yolo" / "data.yaml", tmp_path / "voc"):
        found, scored = tmp_path / "found.json", tmp_path / "scored.json"
        assert main(["infer", model, "--annotations", str(annotations), "--output", str(found), *common]) == 0
        results.append(json.loads(found.read_text()))
        # Two thirds of the truth as detections, so that the figures are not all zero.
        best = [d | {"score": 0.9} for d in json.loads(truth.read_text())["annotations"][:4]]
        found.write_text(json.dumps(best))
        assert main(["evaluate", str(found), "--annotations", str(annotations), "--output", str(scored)]) == 0
        figures.append(json.loads(scored.read_text()))
    assert results[0] and results[0] == results[1] == results[2]
    assert figures[0] == figures[1] == figures[2] and "0.66" in json.dumps(figures[0])

    # An image of unknown size has boxes of unknown size in YOLO: infer leaves both out and scores the others.
    shutil.copy(truth, tmp_path / "images" / "1.jpg")
    capsys.readouterr()
    assert main(["infer", model, "--annotations", str(tmp_path / "yolo"), *common]) == 0
    shown = capsys.readouterr()
    assert "1 damaged image: " in shown.err and "COCO figures" in shown.out
    assert main(["evaluate", str(found), "--annotations", str(tmp_path / "yolo")]) == 1
    assert "1.txt, line 1: the size of its image is not known" in capsys.readouterr().err
