"""Inference on a dataset: files, sizes, thresholds and categories, and no image lost over processes."""

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

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
from odtk.exporting import export
from odtk.inference import infer
from odtk.launch import launch
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.ranks import gather

torch.set_num_threads(1)  # images of 64×96: more threads only wait for each other
CATEGORIES = (Category(4, "cat"), Category(9, "dog"))


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
    last = list(detector.head.cls_head.children())[-1]
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
    assert {d["image_id"] for d in found} == {1, 2, 3, 4, 5}  # a folder's images count from 1
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    shown = capsys.readouterr().out
    assert (
        "--size 60 96 becomes 64 96" in shown
        and "5/5 images" in shown
        and f"{len(found)} detections in 5 of 5" in shown
    )


def damaged_copy(images: Path, folder: Path) -> Path:
    """A copy of the images in which 0.png has lost its end, and 2.png is damaged where only decoding finds it."""
    shutil.copytree(images, folder)
    end = (folder / "0.png").read_bytes()[:-100]
    (folder / "0.png").write_bytes(end)
    inside = bytearray((folder / "2.png").read_bytes())
    inside[3000:3060] = bytes(60)
    (folder / "2.png").write_bytes(inside)
    return folder


@pytest.mark.parametrize("annotated", [True, False])
def test_damaged_images_are_skipped_counted_and_named(model, images, tmp_path, capsys, annotated: bool) -> None:
    folder = damaged_copy(images, tmp_path / "copy")
    annotations = str(folder / "truth.json") if annotated else None
    output = (str(tmp_path / "found.json"),)
    asked = config(model, folder, annotations=annotations, output=output, postprocess=few(), skip_damaged=True)
    found = infer.infer(asked)
    assert {d["image_id"] for d in found} == ({13, 17, 19} if annotated else {2, 4, 5})
    shown = capsys.readouterr()
    assert f"{len(found)} detections in 3 of 5 images (2 damaged ones without detections)" in shown.out
    assert "1 damaged image: " in shown.err and "0.png (the file is truncated" in shown.err
    assert "2.png (image " in shown.err and "gets no detections" in shown.err


@pytest.mark.parametrize("repaired", ["0.png", "2.png"])
def test_strict_inference_fails_on_a_damaged_image_and_writes_nothing(model, images, tmp_path, repaired: str) -> None:
    folder = damaged_copy(images, tmp_path / "copy")
    shutil.copy(images / repaired, folder / repaired)
    with pytest.raises(OdtkError, match="2.png is damaged|1 damaged image: .*0.png") as caught:
        infer.infer(config(model, folder, output=(str(tmp_path / "found.json"),), postprocess=few()))
    assert "--strict" in str(caught.value) and not (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_two_processes_count_the_damage_of_both(model, images, tmp_path, capfd) -> None:
    folder = damaged_copy(images, tmp_path / "copy")
    shutil.copy(images / "0.png", folder / "0.png")
    inside = bytearray((folder / "3.png").read_bytes())
    inside[3000:3060] = bytes(60)
    (folder / "3.png").write_bytes(inside)  # rank 0 has 2.png, rank 1 has 3.png
    output = (str(tmp_path / "found.json"),)
    launch(infer.infer, config(model, folder, output=output, postprocess=few(), skip_damaged=True), devices="cpu:2")
    assert {d["image_id"] for d in json.loads((tmp_path / "found.json").read_text())} == {11, 13, 19}
    assert "(2 damaged ones without detections)" in capfd.readouterr().out


def test_a_rotated_model_gives_rotated_boxes(images: Path, tmp_path: Path) -> None:
    found = infer.infer(config(make_model(tmp_path, angles=ROTATED_ANGLES), images, postprocess=few()))
    assert found and all(len(d["bbox"]) == 5 and len(d["segmentation"][0]) == 8 for d in found)


@pytest.mark.parametrize("path", ["nowhere/out.json", "file/out.json", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(model, images, tmp_path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OdtkError, match="Cannot write"):
        infer.infer(config(str(tmp_path / "no model.pth"), images, output=(str(tmp_path / path),)))


# ---------------------------------------------------------------------------------------------------------------------
# What a file says of itself, against what is asked for


class Stub:
    """The attributes of a backend."""

    name, size, stride, max_batch = "m.onnx", (64, 96), 32, 2
    classes, categories, rotated = 2, CATEGORIES, False
    mean, std, padding = (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "black"
    input_type = "uint8"
    thresholds = PostprocessConfig(score_threshold=0.3)


def test_the_loader_follows_the_file() -> None:
    said: list[str] = []
    data = infer.loader_config(LoaderConfig("x", batch=5), Stub(), said.append)  # type: ignore[arg-type]
    assert (data.size, data.batch, data.mean, data.padding, data.stride) == ((64, 96), 2, (0.1, 0.2, 0.3), "black", 32)
    assert data.input_type == "uint8"
    assert "at most 2 images at a time" in said[0]
    assert infer.loader_config(LoaderConfig("x", size=(60, 90)), Stub()).size == (64, 96)  # type: ignore[arg-type]
    with pytest.raises(OdtkError, match="128×96 contradicts the 64×96"):
        infer.loader_config(LoaderConfig("x", size=(128, 96)), Stub())  # type: ignore[arg-type]


def test_an_expressly_given_threshold_reaches_the_backend(model: str, images: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    limits = PostprocessConfig(score_threshold=0.3)
    export.export(ExportConfig(path=model, output=path, size=(64, 96), precision="fp32", postprocess=limits))
    with pytest.raises(OdtkError, match=r"--score-threshold 0\.05 is below the 0\.3"):
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
    for ids in ((3, 9), (0, 1), (cat.id + 1, cat.id)):  # one, none, and swapped ids in common
        with pytest.raises(OdtkError, match=r"same category names under other ids \('.*' is \d+ in the model, \d+ in"):
            match(CATEGORIES, (Category(ids[0], "dog"), Category(ids[1], "cat")))
    with pytest.raises(OdtkError, match="2 classes and the annotations 1 category:"):
        match(None, (cat,))


def test_gather_outside_of_torch_distributed() -> None:
    assert not dist.is_initialized()
    assert gather(5) == [5]
