"""Detections of a dataset: coordinates, ids, files, and no image lost or doubled over processes."""

import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from odtk import files
from odtk.categories import Category
from odtk.config import (
    ROTATED_ANGLES,
    ExportConfig,
    InferConfig,
    LoaderConfig,
    ModelConfig,
    OdtkError,
    PostprocessConfig,
)
from odtk.data.batch import Batch
from odtk.export import export
from odtk.inference import detect, infer
from odtk.launch import launch
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.postprocess import Detections
from odtk.ranks import gather

torch.set_num_threads(1)  # images of 64×96: more threads only wait for each other
CATEGORIES = (Category(4, "cat"), Category(9, "dog"))


def batch(ids: list[int], scale: tuple[float, float] = (1.0, 1.0)) -> Batch:
    n = len(ids)
    return Batch(
        images=torch.zeros(n, 3, 32, 32),
        boxes=torch.zeros(n, 1, 4),
        labels=torch.full((n, 1), -1),
        ids=torch.tensor(ids),
        scales=torch.tensor([scale] * n),
    )


def detections(rows: list[list[tuple]], values: int = 4, columns: int = 3) -> Detections:
    """Rows of (score, class, box) per image, padded with zeros to D columns."""
    n = len(rows)
    classes = torch.zeros(n, columns, dtype=torch.long)
    found = Detections(torch.zeros(n, columns), torch.zeros(n, columns, values), classes)
    for i, row in enumerate(rows):
        for j, (score, label, box) in enumerate(row):
            found.scores[i, j], found.classes[i, j], found.boxes[i, j] = score, label, torch.tensor(box)
    return found


def test_detections_are_in_original_pixels_with_the_dataset_s_ids() -> None:
    answers = iter(
        [
            detections([[(0.9, 1, (10, 20, 19, 59)), (0.5, 0, (0, 0, 1, 3))], []]),
            detections([[(0.25, 0, (8, 8, 15, 15))]]),
        ]
    )
    seen: list[int] = []
    found = detect.detect(
        lambda images: next(answers), [batch([7, 3], (0.5, 2.0)), batch([5])], CATEGORIES, progress=seen.append
    )
    assert found == [
        {"image_id": 5, "category_id": 4, "category": "cat", "bbox": [8, 8, 8, 8], "score": 0.25},
        {"image_id": 7, "category_id": 9, "category": "dog", "bbox": [20, 10, 20, 20], "score": pytest.approx(0.9)},
        {"image_id": 7, "category_id": 4, "category": "cat", "bbox": [0, 0, 4, 2], "score": 0.5},
    ]
    assert seen == [2, 1]
    json.dumps(found)


def test_rotated_detections_have_an_angle_and_corners() -> None:
    box = (10.0, 10.0, 29.0, 19.0, 0.5, 0.5)  # 20×10 about (20, 15), sin = cos: 45 degrees, whatever their length
    found = detect.detect(lambda images: detections([[(0.5, 0, box)]], 6), [batch([1], (0.5, 0.5))], CATEGORIES)
    assert found[0]["bbox"] == pytest.approx([20, 20, 40, 20, math.pi / 4], abs=1e-4)
    # Turned anticlockwise about (40, 30), the upper left corner (-20, -10) goes to ((-20 - 10), (20 - 10)) / √2.
    assert found[0]["segmentation"][0][:2] == pytest.approx([40 - 30 / math.sqrt(2), 30 + 10 / math.sqrt(2)], abs=0.01)
    assert len(found[0]["segmentation"][0]) == 8


def test_ids_of_64_bits_are_kept_to_the_last_digit() -> None:
    ids = [2**63 - 1, 10**18 + 3, 10**18 + 2, -(2**63)]
    row = [(0.5, 0, (0, 0, 1, 1))]
    found = detect.detect(lambda images: detections([row] * len(images)), [batch(ids[:3]), batch(ids[3:])], CATEGORIES)
    assert [d["image_id"] for d in found] == sorted(ids)


@pytest.mark.parametrize("loader", [[], [batch([1]), batch([2, 3])]])
def test_nothing_found_gives_an_empty_list(loader: list[Batch]) -> None:
    assert detect.detect(lambda images: detections([[]] * len(images)), loader, CATEGORIES) == []


def test_an_image_that_comes_twice_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="twice"):
        detect.detect(lambda images: detections([[]] * len(images)), [batch([1, 2]), batch([2])], CATEGORIES)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def make_model(folder: Path, **changes) -> str:
    """An untrained detector that finds things everywhere."""
    torch.manual_seed(0)
    config = ModelConfig(backbones=("ResNet18FPN",), classes=2, **changes)
    detector = Detector(config)
    detector.initialize()
    last = detector.head.cls_head[-1]
    assert isinstance(last, torch.nn.Conv2d) and last.bias is not None
    torch.nn.init.normal_(last.weight, std=0.3)
    torch.nn.init.constant_(last.bias, -2.5)
    path = str(folder / "model.pth")
    checkpoint.save(path, checkpoint.Checkpoint(config, CATEGORIES, detector.state_dict()))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Five images of three sizes, ids 11, 13, 15, 17, 19, and their annotations."""
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(1)
    entries = []
    for i, (w, h) in enumerate([(64, 48), (48, 64), (80, 40), (64, 48), (64, 48)]):
        Image.fromarray(torch.randint(0, 255, (h, w, 3), dtype=torch.uint8).numpy()).save(folder / f"{i}.png")
        entries.append({"id": 11 + 2 * i, "file_name": f"{i}.png", "width": w, "height": h})
    content = {
        "images": entries,
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        "annotations": [{"id": 1, "image_id": 11, "category_id": 9, "bbox": [5, 5, 30, 20]}],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return folder


def config(model: str, images: Path, **changes) -> InferConfig:
    names = {"output", "postprocess", "explicit"}
    data: dict[str, Any] = {
        "images": str(images),
        "annotations": str(images / "truth.json"),
        "loader": "torch",
        "size": (64, 96),
    }
    data |= {k: v for k, v in changes.items() if k not in names}
    return InferConfig(model, LoaderConfig(**data), **{k: v for k, v in changes.items() if k in names})


def test_two_processes_find_what_one_finds(model: str, images: Path, tmp_path: Path) -> None:
    alone = infer.infer(config(model, images, output=(str(tmp_path / "1.json"),), postprocess=few()))
    assert {d["image_id"] for d in alone} == {11, 13, 15, 17, 19}
    launch(infer.infer, config(model, images, output=(str(tmp_path / "2.json"),), postprocess=few()), devices="cpu:2")
    assert json.loads((tmp_path / "1.json").read_text()) == alone
    together = json.loads((tmp_path / "2.json").read_text())
    assert [(d["image_id"], d["category_id"]) for d in together] == [(d["image_id"], d["category_id"]) for d in alone]
    for a, b in zip(alone, together, strict=True):
        assert b["bbox"] == pytest.approx(a["bbox"], abs=0.01) and b["score"] == pytest.approx(a["score"], abs=1e-5)


def late(config: InferConfig, rank: int, world: int) -> None:
    """A job: rank 1 gets its images when a collective of the default group would long have failed."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    loader = infer.create_loader

    def slow(*arguments):
        time.sleep(4 * rank)
        return loader(*arguments)

    infer.create_loader = slow
    infer.infer(config, rank, world)


@pytest.mark.slow
def test_a_rank_waits_for_a_slower_one(model: str, images: Path, tmp_path: Path) -> None:
    launch(late, config(model, images, output=(str(tmp_path / "out.json"),), postprocess=few()), devices="cpu:2")
    assert {d["image_id"] for d in json.loads((tmp_path / "out.json").read_text())} == {11, 13, 15, 17, 19}


def few() -> PostprocessConfig:
    return PostprocessConfig(detections=4, top_n=50)


def test_what_a_run_prints_and_writes(model: str, images: Path, tmp_path: Path, capsys) -> None:
    outputs = (str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    found = infer.infer(config(model, images, output=outputs, annotations=None, size=(60, 96), postprocess=few()))
    assert [d["image_id"] for d in found[::4]] == [1, 2, 3, 4, 5]  # a folder's images count from 1
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    shown = capsys.readouterr().out
    assert "--size 60 96 becomes 64 96" in shown and "5/5 images" in shown and "20 detections in 5 of 5" in shown


def test_a_rotated_model_gives_rotated_boxes(images: Path, tmp_path: Path) -> None:
    found = infer.infer(config(make_model(tmp_path, angles=ROTATED_ANGLES), images, postprocess=few()))
    assert found and all(len(d["bbox"]) == 5 and len(d["segmentation"][0]) == 8 for d in found)


@pytest.mark.parametrize("path", ["nowhere/out.json", "file/out.json", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(model, images, tmp_path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OdtkError, match="Cannot write"):
        infer.infer(config(str(tmp_path / "no model.pth"), images, output=(str(tmp_path / path),)))


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


# ---------------------------------------------------------------------------------------------------------------------
# What a file says of itself, against what is asked for


class Stub:
    """The attributes of a backend."""

    name, size, stride, max_batch = "m.onnx", (64, 96), 32, 2
    classes, categories, rotated = 2, CATEGORIES, False
    mean, std = (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)
    thresholds = PostprocessConfig(score_threshold=0.3)


def test_the_loader_follows_the_file() -> None:
    said: list[str] = []
    data = infer.loader_config(LoaderConfig("x", batch=5), Stub(), said.append)  # type: ignore[arg-type]
    assert (data.size, data.batch, data.mean, data.stride) == ((64, 96), 2, (0.1, 0.2, 0.3), 32)
    assert "at most 2 images at a time" in said[0]
    assert infer.loader_config(LoaderConfig("x", size=(60, 90)), Stub()).size == (64, 96)  # type: ignore[arg-type]
    with pytest.raises(OdtkError, match="128×96 contradicts the 64×96"):
        infer.loader_config(LoaderConfig("x", size=(128, 96)), Stub())  # type: ignore[arg-type]


def test_an_expressly_given_threshold_reaches_the_backend(model: str, images: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    limits = PostprocessConfig(score_threshold=0.3)
    export.export(ExportConfig(path=model, output=path, size=(64, 96), precision="fp32", postprocess=limits))
    with pytest.raises(OdtkError, match=r"--score-threshold 0\.05 contradicts the 0\.3"):
        infer.infer(config(path, images, explicit=("score_threshold",)))


def match(own: tuple[Category, ...] | None, annotated: tuple[Category, ...]) -> tuple[tuple[Category, ...], str]:
    said: list[str] = []
    stub = Stub()
    stub.categories = own  # type: ignore[assignment]
    return infer.match_categories(stub, annotated, said.append), " ".join(said)  # type: ignore[arg-type]


def test_categories_of_the_model_and_of_the_annotations() -> None:
    cat, dog = CATEGORIES
    assert match(CATEGORIES, CATEGORIES) == (CATEGORIES, "")
    assert match(CATEGORIES, ()) == (CATEGORIES, "")
    assert match(None, (cat, dog)) == ((cat, dog), "")
    own, said = match(None, ())
    assert [c.id for c in own] == [0, 1] and "class indices" in said
    own, said = match(CATEGORIES, (cat, Category(10, "emu")))
    assert own == CATEGORIES and "the model does not detect: 10 emu" in said and "not scored: 9 dog" in said
    with pytest.raises(OdtkError, match="Category 9 is 'dog' in the model and 'cow' in the annotations"):
        match(CATEGORIES, (cat, Category(9, "cow")))
    with pytest.raises(OdtkError, match="nothing in common"):
        match(CATEGORIES, (Category(1, "cat"),))
    with pytest.raises(OdtkError, match="2 classes and the annotations 1 category:"):
        match(None, (cat,))


def test_gather_outside_of_torch_distributed() -> None:
    assert not dist.is_initialized()
    assert gather(5) == [5]
