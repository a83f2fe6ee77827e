"""Pictures are written, hold what they should where they should, and refuse what cannot be drawn."""

import functools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odtk.categories import Category
from odtk.cli import build_parser
from odtk.config import LoaderConfig, ModelConfig, OdtkError
from odtk.data.dataset import Dataset
from odtk.evaluation import anchor_matches, curves, features, pictures, visualize
from odtk.evaluation.evaluate import STATS
from odtk.inference import drawing
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.training.assign import assign

torch.set_num_threads(1)
GRAY = (128, 128, 128)
RULE = functools.partial(assign, background_iou=0.4, foreground_iou=0.5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two gray images with one box each, the second one rotated in rotated.json."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2):
        Image.new("RGB", (480, 400), GRAY).save(folder / f"{i}.png")
    entries = [{"id": i, "file_name": f"{i}.png", "width": 480, "height": 400} for i in (1, 2)]
    boxes = [{"id": i, "image_id": i, "category_id": 3, "bbox": [100, 200, 120, 80]} for i in (1, 2)]
    content = {"images": entries, "categories": [{"id": 3, "name": "cell"}], "annotations": boxes}
    (folder / "truth.json").write_text(json.dumps(content))
    content["annotations"] = [box | {"bbox": [100, 200, 120, 80, 0.5]} for box in boxes]
    (folder / "rotated.json").write_text(json.dumps(content))
    return folder


def data(images: Path, annotations: str | None = "truth.json", **changes) -> LoaderConfig:
    path = None if annotations is None else str(images / annotations)
    return LoaderConfig(images=str(images), annotations=path, loader="torch", **changes)


def changed(path: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not gray in a picture."""
    drawn = (np.abs(np.asarray(Image.open(path)).astype(int) - 128) > 60).any(axis=2)
    rows, columns = drawn.any(axis=1).nonzero()[0], drawn.any(axis=0).nonzero()[0]
    return columns[0], rows[0], columns[-1], rows[-1]


def test_truth_is_drawn_where_it_is(images: Path, tmp_path: Path) -> None:
    paths = visualize.draw_ground_truth(data(images), str(tmp_path / "out"))
    assert [Path(p).name for p in paths] == ["1_1.jpg", "2_2.jpg"]
    left, top, right, bottom = changed(paths[0])
    assert (left, right, bottom) == pytest.approx((100, 220, 280), abs=3)
    assert 170 < top < 200  # the label is above the box


def test_a_rotated_box_is_drawn_turned(images: Path, tmp_path: Path) -> None:
    [path] = visualize.draw_ground_truth(data(images, "rotated.json"), str(tmp_path), count=1)
    left, _, right, bottom = changed(path)
    half = 60 * math.cos(0.5) + 40 * math.sin(0.5)
    assert (left, right) == pytest.approx((160 - half, 160 + half), abs=3)
    assert bottom == pytest.approx(240 + 60 * math.sin(0.5) + 40 * math.cos(0.5), abs=3)
    # Anticlockwise on the screen: the right end is up.
    corners = drawing.coco_to_outline([100, 200, 120, 80, 0.5])
    assert corners[1][1] < corners[0][1]


@pytest.mark.parametrize("box", [[math.nan, 1, 9, 9], [1, 1, math.inf, 9], [100, 200, 0, 80]])
def test_boxes_that_training_drops_are_not_drawn(images: Path, tmp_path: Path, box: list[float]) -> None:
    content = json.loads((images / "truth.json").read_text())
    content["annotations"] = [content["annotations"][0] | {"bbox": box}]
    (images / "truth.json").write_text(json.dumps(content))
    [path] = visualize.draw_ground_truth(data(images), str(tmp_path), count=1)
    assert (np.abs(np.asarray(Image.open(path)).astype(int) - 128) < 10).all()


def test_an_annotation_without_a_box_is_named(images: Path, tmp_path: Path) -> None:
    text = (images / "truth.json").read_text()
    (images / "truth.json").write_text(text.replace("[100, 200, 120, 80]", "null", 1))
    with pytest.raises(OdtkError, match="annotation 1: its bbox is not a list"):
        visualize.draw_ground_truth(data(images), str(tmp_path))


def test_detections_get_a_picture_each_even_where_there_are_none(images: Path, tmp_path: Path) -> None:
    entry = {"category_id": 3, "category": "cell", "bbox": [10, 300, 50, 50]}
    found = [{"image_id": 2, "score": 0.1, **entry}]
    first, second = visualize.draw_detections(found, pictures.open_pictures(data(images), str(tmp_path)))
    assert (np.abs(np.asarray(Image.open(first)).astype(int) - 128) < 10).all()
    assert changed(second)[3] == pytest.approx(350, abs=3)


def test_detections_stand_beside_the_truth_and_below_the_threshold_they_do_not(images: Path, tmp_path: Path) -> None:
    found = [{"image_id": 1, "category_id": 3, "bbox": [10, 300, 50, 50], "score": s} for s in (0.2, 0.9)]
    (tmp_path / "found.json").write_text(json.dumps(found))
    path = str(tmp_path / "found.json")
    [picture] = visualize.draw_results(path, data(images), str(tmp_path / "a"), score_threshold=0.5, count=1)
    assert Image.open(picture).width == 2 * 480 + 8
    [picture] = visualize.draw_results(path, data(images, None), str(tmp_path / "b"), score_threshold=0.95, count=1)
    assert (np.abs(np.asarray(Image.open(picture)).astype(int) - 128) < 10).all()


def test_a_file_of_annotations_is_no_file_of_detections(images: Path, tmp_path: Path) -> None:
    def sentence(content: object, annotations: str | None = "truth.json") -> str:
        (tmp_path / "found.json").write_text(json.dumps(content))
        with pytest.raises(OdtkError) as error:
            visualize.draw_results(
                str(tmp_path / "found.json"), data(images, annotations), str(tmp_path / "out"), score_threshold=0.5
            )
        return str(error.value)

    truth = json.loads((images / "truth.json").read_text())
    assert "no finite 'score'" in sentence(truth) and "no finite 'score'" in sentence(truth, None)
    assert "not a list" in sentence(3)
    assert "not a dictionary" in sentence([3])
    assert "image_id 9 is not" in sentence([{"image_id": 9, "category_id": 3, "bbox": [1, 1, 9, 9], "score": 0.9}])


def test_labels_stay_inside_and_apart() -> None:
    image = Image.new("RGB", (400, 400), GRAY)
    corner = drawing.Shape([(0, 0), (30, 0), (30, 30), (0, 30)], drawing.RED, "a rather long name 0.99")
    one, two = (np.asarray(drawing.annotate(image, [corner] * n)) for n in (1, 2))
    red = [(picture == drawing.RED).all(axis=2).sum() for picture in (one, two)]
    assert red[1] > 1.7 * red[0] - 200  # the second label is not on top of the first
    assert (np.asarray(image) == 128).all()  # a copy was drawn on


def test_a_picture_keeps_the_size_of_its_image_unless_a_side_is_asked_for() -> None:
    assert drawing.annotate(Image.new("RGB", (60, 50)), []).size == (60, 50)
    assert drawing.annotate(Image.new("RGB", (60, 50)), [], min_side=400).size == (480, 400)


def square(x: float, y: float, side: float, label: str = "") -> drawing.Shape:
    return drawing.Shape([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], drawing.RED, label)


def test_a_label_does_not_cover_a_neighbor() -> None:
    """Above the second box, where its label would go, lies the first; there is room inside it."""
    points = square(100, 100, 80).outline
    neighbor = np.array([[100.0, 20.0, 180.0, 98.0]])
    assert drawing.place_label((60, 12), points, (400, 400), [], neighbor) == (100, 100, 160, 112)
    assert drawing.place_label((60, 12), points, (400, 400), [], np.zeros((0, 4))) == (100, 88, 160, 100)
    # Where every place covers something, the least; never another label, rather none.
    around = np.array([[90.0, 20.0, 300.0, 300.0], [100.0, 20.0, 180.0, 150.0]])
    x, y, *_ = drawing.place_label((60, 12), points, (400, 400), [], around) or (0, 0)
    assert (x, y) == (40, 100)  # beside it on the left
    assert drawing.place_label((60, 12), points, (400, 400), [(0, 0, 400, 400)], neighbor) is None


def test_labels_of_a_wall_of_boxes_never_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[drawing.Rectangle] = []
    monkeypatch.setattr(drawing, "draw_label", lambda draw, shape, place, font: written.append(place))
    image = Image.new("RGB", (320, 240), GRAY)
    drawing.annotate(image, [square(18.0 * (i % 10) + 20, 20.0 * (i // 10) + 20, 16, "cell 0.97") for i in range(90)])
    assert 10 < len(written) < 90
    assert not any(drawing.intersect(a, b) for i, a in enumerate(written) for b in written[:i])


def test_a_picture_is_not_larger_than_a_jpeg_can_hold(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (2000, 5), GRAY).save(images / "1.png")
    (images / "truth.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "1.png"}]}))
    (tmp_path / "found.json").write_text("[]")
    [path] = visualize.draw_results(str(tmp_path / "found.json"), data(images), str(tmp_path), score_threshold=0.5)
    assert Image.open(path).width == 2 * 2000 + 8  # the truth beside the detections
    assert drawing.annotate(Image.new("RGB", (2000, 5)), [], min_side=400).width == 32000
    assert drawing.annotate(Image.new("RGB", (1, 70000)), []).size == (1, 32000)


def test_colors_of_neighbors_differ() -> None:
    colors = [np.array(drawing.category_color(i)) for i in range(40)]
    assert min(np.abs(a - b).sum() for a, b in zip(colors, colors[1:], strict=False)) > 150
    assert len({tuple(c) for c in colors}) == 40


# ---------------------------------------------------------------------------------------------------------------------
# Inside a model


def make_model(tmp_path: Path, **changes) -> str:
    config = ModelConfig(backbones=("ResNet18FPN",), classes=1, **changes)
    detector = Detector(config)
    detector.initialize()
    path = str(tmp_path / "model.pth")
    checkpoint.save(path, checkpoint.Checkpoint(config, (Category(3, "cell"),), detector.state_dict()))
    return path


def test_feature_maps_of_a_layer_by_name_or_end(images: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    layer2 = features.draw_features(model, "layer2", data(images, resize=64), str(tmp_path / "f"), count=1)
    assert len(layer2) == 1 and layer2[0].endswith("layer2_0.png")
    pyramid = "backbones.ResNet18FPN"
    levels = features.draw_features(model, pyramid, data(images, resize=64), str(tmp_path / "f"), count=2)
    assert len(levels) == 2 * 5  # images × levels
    with pytest.raises(OdtkError, match="There is no layer layer: try .*layer"):
        features.draw_features(model, "layer", data(images, resize=64), str(tmp_path), count=1)
    with pytest.raises(OdtkError, match="[0-9] layers end in .conv1: choose one of .*layer1.0.conv1"):
        features.draw_features(model, "conv1", data(images, resize=64), str(tmp_path), count=1)
    with pytest.raises(OdtkError, match="try .*lateral3"):
        features.draw_features(model, "lateral", data(images, resize=64), str(tmp_path), count=1)


def test_the_layer_that_the_help_names_can_be_drawn(tmp_path: Path) -> None:
    commands = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    text = next(action.help for action in commands["visualize"]._actions if action.dest == "features")
    layer = re.search(r"for example (\w+)", text)
    assert layer
    features.find_layer(checkpoint.build_detector(checkpoint.load(make_model(tmp_path))), layer[1])


def test_a_grid_shows_each_map_over_its_own_range() -> None:
    maps = torch.stack([torch.arange(12.0).view(3, 4), 100 * torch.arange(12.0).view(3, 4), torch.zeros(3, 4)])
    grid = np.asarray(features.feature_grid(maps, "maps", Image.new("RGB", (8, 6))))
    colors = {tuple(c) for c in grid.reshape(-1, 3)}
    assert {tuple(drawing.PLASMA[0]), tuple(drawing.PLASMA[-1])} <= colors
    factor = 24  # 96 / 4
    columns = grid.shape[1] - 2 * (4 * factor + 2)  # two columns of tiles stand on the right
    first = grid[28 : 28 + 3 * factor, columns : columns + 4 * factor]
    second = grid[28 : 28 + 3 * factor, columns + 4 * factor + 2 : columns + 8 * factor + 2]
    assert (first == second).all()


def test_anchors_that_match_and_a_box_that_none_reaches(images: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    truth = json.loads((images / "truth.json").read_text())
    truth["annotations"][1]["bbox"] = [300, 20, 6, 6]  # far below the smallest anchor
    (images / "truth.json").write_text(json.dumps(truth))
    settings = data(images, resize=400)
    detector = checkpoint.build_detector(checkpoint.load(model))
    dataset = Dataset.load(settings.annotations, settings.images)
    batches = [batch for _, batch in pictures.network_inputs(detector, dataset, settings, 2)]
    reached, missed = (anchor_matches.anchor_shapes(detector, batch, RULE) for batch in batches)
    assert int(reached[-1].label.split()[0]) >= len(reached) - 1 > 1 and reached[-1].color != drawing.RED
    assert missed[-1].label.startswith("0 anchors, stride 8") and missed[-1].color == drawing.RED and len(missed) == 2
    assert len(anchor_matches.draw_anchors(model, settings, RULE, str(tmp_path / "out"), count=2)) == 2


def test_anchors_of_fcos_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="points, not anchors"):
        anchor_matches.draw_anchors(make_model(tmp_path, head="fcos"), data(images), RULE, str(tmp_path), count=1)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def test_a_resumed_run_replaces_what_it_did_again_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"iteration": i, "time": 0.0, "loss": 1.0 / i, "lr": 0.1} for i in (1, 2, 3)]
    records += [{"iteration": 2, "time": 0.0, "loss": 7.0, "lr": 0.1}]
    records += [{"iteration": 2, "time": 0.0, **dict(zip(STATS, [0.5, 0.6, -1] + [0.1] * 9, strict=True))}]
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"iteration": 3, "lo')
    found = curves.read_curves(path)
    assert found["loss"] == [(1, 1.0), (2, 7.0)] and found["AP"] == [(2, 0.5)]
    assert "AP75" not in found and "time" not in found
    pytest.importorskip("matplotlib")
    [picture] = curves.draw_curves(str(tmp_path), str(tmp_path / "out"))
    assert min(Image.open(picture).size) > 300


@pytest.mark.parametrize(("classes", "plots"), [(3, 2), (40, 1)])
def test_curves_of_few_classes_are_drawn(tmp_path: Path, classes: int, plots: int) -> None:
    pytest.importorskip("matplotlib")
    record = {"iteration": 2, "AP": 0.5, **{f"AP/{i}": 0.1 for i in range(classes - 1)}, "AP/a $ sign": 0.2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    [picture] = curves.draw_curves(str(tmp_path), str(tmp_path / "out"))
    assert round(Image.open(picture).height / (2.6 * 110)) == plots


def test_curves_without_a_log_or_without_matplotlib(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(OdtkError, match="--logdir"):
        curves.read_curves(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(OdtkError, match="holds no values"):
        curves.read_curves(tmp_path / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OdtkError, match=r"odtk\[report\]"):
        curves.draw_curves(str(tmp_path), str(tmp_path))


def test_the_user_s_images_are_not_drawn_over(images: Path, tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="another folder"):
        visualize.draw_ground_truth(data(images), str(images))
    (tmp_path / "file").write_text("")
    with pytest.raises(OdtkError, match="Cannot make"):
        visualize.draw_ground_truth(data(images), str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("target", [".", "sub", "sub/new"])
def test_pictures_do_not_go_among_images_that_the_next_run_would_list(images: Path, tmp_path: Path, target) -> None:
    model, listed, folder = make_model(tmp_path), data(images, None, resize=64), str(images / target)
    (tmp_path / "found.json").write_text("[]")
    with pytest.raises(OdtkError, match="among the images of .*another folder"):
        pictures.open_pictures(listed, folder)
    with pytest.raises(OdtkError, match="another folder"):
        visualize.draw_results(str(tmp_path / "found.json"), listed, folder, score_threshold=0.5)
    with pytest.raises(OdtkError, match="another folder"):
        features.draw_features(model, "layer2", listed, folder, count=1)
    assert not (images / "sub").exists()
    assert len(visualize.draw_ground_truth(data(images), str(images / "sub"))) == 2  # annotations name the images


def test_no_picture_replaces_an_image_that_the_annotations_name(images: Path, tmp_path: Path) -> None:
    model, folder = make_model(tmp_path), images / "sub"
    folder.mkdir()
    (tmp_path / "found.json").write_text("[]")
    for name, draw in (
        ("1_1.jpg", lambda: visualize.draw_ground_truth(data(images), str(folder))),
        ("1_1.jpg", lambda: visualize.draw_detections([], pictures.open_pictures(data(images), str(folder)))),
        (
            "1_1.jpg",
            lambda: visualize.draw_results(
                str(tmp_path / "found.json"), data(images), str(folder), score_threshold=0.5
            ),
        ),
        (
            "1_1_anchors.png",
            lambda: anchor_matches.draw_anchors(model, data(images, resize=64), RULE, str(folder), count=1),
        ),
        (
            "1_1_backbones.ResNet18FPN.features.layer2_0.png",
            lambda: features.draw_features(model, "layer2", data(images, resize=64), str(folder), count=1),
        ),
    ):
        file = folder / name
        Image.new("RGB", (480, 400), GRAY).save(file)
        before = file.read_bytes()
        entries = [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": f"sub/{name}"}]
        (images / "truth.json").write_text(json.dumps({"images": entries}))
        with pytest.raises(OdtkError, match="is an image of the dataset"):
            draw()
        assert file.read_bytes() == before
