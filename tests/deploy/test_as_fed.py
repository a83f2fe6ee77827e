"""AP as a deployment feeds a model: what nvinfer makes of a frame, and the classic mistakes caught by their names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

import odtk
from odtk.cli import main
from odtk.config import ExportConfig, OdtkError, PostprocessConfig
from odtk.deploy import as_fed
from odtk.deploy.as_fed import FedVerdict, Feeding, cause_of, feed, verify_as_fed
from odtk.deploy.manifest import read_manifest
from odtk.evaluation.bootstrap import Comparison
from odtk.evaluation.verify import Evaluator
from odtk.inference.predict import Detections

RIGHT = Feeding(keep_aspect=True)
SIZE = (64, 64)


def photo(seed: int, size: tuple[int, int] = (90, 60)) -> np.ndarray:
    """A colored image of blobs, uint8 [h, w, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4))).astype(float)
    return np.clip((soft - 127) * 4 + [170, 110, 60], 0, 255).astype(np.uint8)


def ours(pixels: np.ndarray) -> np.ndarray:
    """What odtk's loader feeds, black padding: Pillow's bilinear filter, which is against aliasing."""
    scale = min(SIZE[0] / pixels.shape[0], SIZE[1] / pixels.shape[1])
    width, height = (max(1, round(side * scale)) for side in pixels.shape[1::-1])
    canvas = np.zeros((3, *SIZE), np.float32)
    scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    canvas[:, :height, :width] = np.asarray(scaled).transpose(2, 0, 1)
    return canvas


def labeled(found: Detections) -> list[tuple[list[float], int]]:
    """Boxes and class indices."""
    return list(zip(found.boxes.tolist(), found.labels.tolist(), strict=True))


def pairs(how: Feeding) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    images = [photo(seed, size) for seed, size in enumerate([(90, 60), (100, 70), (50, 120)])]
    return [(pixels, feed(pixels, SIZE, how)[0], ours(pixels)) for pixels in images]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, "resize filter"),
        ({"nearest": True}, "resize filter"),
        ({"bgr": True}, "color order"),
        ({"scale": 1 / 255}, "normalization twice"),
        ({"scale": 1 / 57, "offsets": (124.0, 116.0, 104.0)}, "normalization twice"),
        ({"symmetric": True}, "symmetric padding"),
        ({"keep_aspect": False}, "stretched"),
    ],
)
def test_a_mistake_is_named(change: dict, cause: str) -> None:
    assert cause_of(pairs(dataclasses.replace(RIGHT, **change)), SIZE) == cause


@pytest.mark.parametrize("name", ["symmetric padding", "stretched"])
def test_a_mistake_is_named_where_one_frame_shows_it(name: str) -> None:
    """The client's resize filter differs from nvinfer's by more on seven frames than the mistake on a portrait."""
    how = dataclasses.replace(RIGHT, **as_fed.MISTAKES[name])
    noise = np.random.default_rng(0).integers(0, 256, (7, 256, 256, 3), dtype=np.uint8)
    square = [(pixels, ours(pixels), ours(pixels)) for pixels in noise]
    portrait = photo(8, (50, 60))
    assert cause_of([*square, (portrait, feed(portrait, SIZE, how)[0], ours(portrait))], SIZE) == name


def test_padding_of_another_color_is_named() -> None:
    mean = [(pixels, fed, np.where(right == 0, 116, right)) for pixels, fed, right in pairs(RIGHT)]
    assert cause_of(mean, SIZE) == "padding"


def test_the_same_inputs_have_no_cause_even_where_padding_is_most_of_them() -> None:
    wide = photo(0, (120, 20))
    assert cause_of([(wide, ours(wide), ours(wide))], SIZE) == "nothing"
    assert cause_of([(wide, feed(wide, SIZE, RIGHT)[0], ours(wide))], SIZE) == "resize filter"


def test_frames_lie_where_nvinfer_puts_them() -> None:
    frame = np.full((49, 101, 3), [10, 20, 30], np.uint8)  # of 48 by 100 pixels, as it takes whole pairs
    values, scale, place = feed(frame, SIZE, RIGHT)
    assert scale == (0.64, 30 / 48) and place == (0, 0)  # 30.72 rows are cut to 30
    assert values[:, 29, 63].tolist() == [10, 20, 30] and not values[:, 30:].any()
    values, _, place = feed(frame, SIZE, dataclasses.replace(RIGHT, symmetric=True, bgr=True))
    assert place == (0, 17) and values[:, 17, 0].tolist() == [30, 20, 10] and not values[:, :17].any()
    values, scale, _ = feed(frame, SIZE, Feeding(scale=0.5, offsets=(10.0, 0.0, 0.0)))
    assert scale == (0.64, 64 / 48) and values[:, 63, 63].tolist() == [0, 10, 15]


def test_a_mistake_fails_even_where_ap_does_not_show_it() -> None:
    same = Comparison(drop=0.0, low=0.0, high=0.0, images=9, allowed=0.3)
    assert FedVerdict("triton", 0.5, 0.5, same, "resize filter").exit_code == 0
    assert FedVerdict("triton", 0.5, 0.5, same, "color order").exit_code == 2
    lost = Comparison(drop=2.0, low=1.0, high=3.0, images=9, allowed=0.3)
    assert FedVerdict("triton", 0.5, 0.48, lost, "resize filter").exit_code == 2
    assert FedVerdict("triton", 0.5, 0.5, same, "nothing").exit_code == 0
    assert FedVerdict("triton", 0.5, 0.48, lost, "nothing").exit_code == 2


@pytest.mark.parametrize("size", [(2000, 3), (3, 2000), (1, 50), (50, 1), (1, 1)])
@pytest.mark.parametrize("how", [RIGHT, Feeding(), Feeding(keep_aspect=True, symmetric=True)])
def test_a_thin_frame_keeps_a_pixel(size: tuple[int, int], how: Feeding) -> None:
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    values, scale, _ = feed(pixels, SIZE, how)
    assert values.max() == 200 and min(scale) > 0
    assert cause_of([(pixels, values, ours(pixels))], SIZE) in {"nothing", "resize filter", "padding", *as_fed.MISTAKES}


def test_a_configuration_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="There is no configuration"):
        Feeding.read(str(tmp_path / "none.txt"))
    (tmp_path / "bad.txt").write_text("[property]\nnet-scale-factor=much\n")
    with pytest.raises(OdtkError, match="not a configuration of nvinfer"):
        Feeding.read(str(tmp_path / "bad.txt"))


@pytest.fixture
def measured(bundle: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the bundle, and a proof on which its model finds everything: images and what it finds in them."""
    sizes = [(64, 48)] * 4 + [(90, 60)] * 2  # most are not resized: fed alike
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    return folder, proof_of(folder, tmp_path, sizes)


def proof_of(folder: Path, tmp_path: Path, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Images of some (width, height), and what the model of a bundle finds in them."""
    images = tmp_path / "images"
    images.mkdir()
    entries: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    model = odtk.load(folder / "model.onnx", device="cpu")
    for i, size in enumerate(sizes):
        Image.fromarray(photo(i, size)).save(images / f"{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        for (x, y, u, v), label in labeled(model.predict(images / f"{i}.png")):
            box = {"bbox": [x, y, u - x, v - y], "area": (u - x) * (v - y), "iscrowd": 0}
            objects.append({"id": len(objects) + 1, "image_id": i, "category_id": [3, 8][label], **box})
    names = [{"id": 3, "name": "red; round cell"}, {"id": 8, "name": "two\nlines"}]
    truth = {"images": entries, "categories": names, "annotations": objects}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return {"annotations": str(tmp_path / "truth.json"), "images": str(images)}


def verdict(folder: Path, proof: dict[str, Any], target: str) -> FedVerdict:
    """What is found of a bundle's model for ``target``."""
    config = ExportConfig("none.pth", str(folder / "model.onnx"), postprocess=PostprocessConfig())
    ours = Evaluator(config, proof["annotations"], proof["images"], "cpu").run(config.output)
    if target == "deepstream":
        config = dataclasses.replace(config, output=str(folder / "deepstream" / "model.onnx"))
    return verify_as_fed(config, target, ours, max_ap_drop=0.3, **proof)


def test_a_bundle_as_deepstream_feeds_it_and_with_a_mistake(measured: tuple[Path, dict[str, Any]], capsys) -> None:
    folder, proof = measured
    config = folder / "deepstream" / "config_infer.txt"
    text, found = config.read_text(), verdict(folder, proof, "deepstream")
    assert found.cause == "resize filter" and found.ap > 0.5 and found.ap_fed == pytest.approx(found.ap, abs=0.2)
    config.write_text(text.replace("model-color-format=0", "model-color-format=1"))
    found = verdict(folder, proof, "deepstream")
    assert (found.exit_code, found.cause) == (2, "color order") and found.ap_fed < found.ap - 0.05
    assert json.loads((folder / "deepstream" / "as_fed.json").read_text())["cause"] == "color order"
    assert "mend the color order in deepstream/config_infer.txt" in capsys.readouterr().out


def test_padding_and_stretching_are_named_though_the_first_images_are_square(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    proof = proof_of(folder, tmp_path, [(64, 64)] * 8 + [(48, 96)])
    config = folder / "deepstream" / "config_infer.txt"
    text = config.read_text()
    for old, new, cause in (
        ("symmetric-padding=0", "symmetric-padding=1", "symmetric padding"),
        ("maintain-aspect-ratio=1", "maintain-aspect-ratio=0", "stretched"),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        found = verdict(folder, proof, "deepstream")
        assert (found.cause, found.exit_code) == (cause, 2)


def test_thin_images_are_fed(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    proof = proof_of(folder, tmp_path, [(64, 48)] * 2 + [(2000, 3), (1, 50)])
    for target in ("deepstream", "triton"):
        assert verdict(folder, proof, target).cause in {"nothing", "resize filter", "padding"}


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("", "", "nothing"),
        ("np.asarray(scaled).transpose", "np.asarray(scaled)[:, :, ::-1].transpose", "color order"),
        ("scale = min(height / image.height, width / image.width)", "size = (width, height)", "stretched"),
        ("Resampling.BILINEAR", "Resampling.NEAREST", "resize filter"),
        ("beyond = np.zeros(3) if", "beyond = np.full(3, 99) if", "padding"),
    ],
)
def test_the_client_for_triton_and_its_mistakes(
    old: str, new: str, cause: str, measured: tuple[Path, dict[str, Any]]
) -> None:
    folder, proof = measured
    client = folder / "triton" / "client.py"
    text = client.read_text()
    if cause == "stretched":
        text = text.replace("    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))\n", "")
    assert old in text
    client.write_text(text.replace(old, new))
    found = verdict(folder, proof, "triton")
    assert found.cause == cause
    if cause == "nothing":
        assert found.exit_code == 0 and found.ap_fed == pytest.approx(found.ap, abs=0.02)
    elif cause in as_fed.MISTAKES:
        assert found.exit_code == 2


def test_a_client_that_cannot_be_run_is_one_sentence(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, proof = measured
    (folder / "triton" / "client.py").write_text("import none_such\n")
    with pytest.raises(OdtkError, match=r"client\.py cannot be run: ModuleNotFoundError"):
        verdict(folder, proof, "triton")


@pytest.mark.slow
def test_the_export_measures_as_what_it_is_asked(measured: tuple[Path, dict[str, Any]], bundle: Path) -> None:
    folder, proof = measured
    model, target = str(bundle.parent / "model.pth"), folder.parent / "new"
    words = ["--bundle", "--size", "64", "--full-precision", "--devices", "cpu", "--verify"]
    words += ["--annotations", proof["annotations"], "--images", proof["images"], "--as", "triton", "deepstream"]
    assert main(["export", model, str(target), *words]) in (0, 2, 3)
    for name in ("triton", "deepstream"):
        assert json.loads((target / name / "as_fed.json").read_text())["target"] == name
    assert "triton/as_fed.json" in read_manifest(str(target))["files"]
    card = (target / "model_card.md").read_text()
    assert "As Triton's client feeds it: AP" in card and "As DeepStream feeds it: AP" in card
    with pytest.raises(OdtkError, match="needs --bundle and --verify"):
        odtk.export(model, folder.parent / "other", bundle=True, fed_as=("triton",))
