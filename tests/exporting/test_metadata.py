"""What an exported file says about itself may be damaged or made by anybody."""

import json
import random
from typing import Any

import pytest

from odtk.categories import Category
from odtk.config import OdtkError
from odtk.exporting.metadata import Metadata

GOOD = Metadata(
    size=(64, 96),
    stride=32,
    classes=2,
    categories=(Category(3, "red"), Category(7, "green")),
    precision="fp32",
    postprocessing="detections",
    box_values=4,
    score_threshold=0.05,
    nms_threshold=0.5,
    detections=100,
    top_n=1000,
    batch=(1, 8, 16),
    model="0" * 64,
)


def changed(**values: Any) -> str:
    return json.dumps(json.loads(GOOD.to_json()) | values)


@pytest.mark.parametrize(
    "values, fault",
    [
        ({"std": [0.2, 0.0, 0.2]}, r"std is \(0.2, 0.0, 0.2\), and must be positive"),
        ({"std": [0.2, -0.2, 0.2]}, "must be positive"),
        ({"std": [0.2, float("nan"), 0.2]}, "std is"),
        ({"mean": [0.2, float("inf"), 0.2]}, "mean is"),
        ({"mean": [0.2]}, r"mean is \(0.2,\)"),
        ({"mean": ["a", "b", "c"]}, "mean is"),
        ({"size": [64.5, 96]}, "size is"),
        ({"size": [0, 96]}, "must be positive"),
        ({"stride": 0}, "stride is 0, and must be positive"),
        ({"classes": "2"}, "classes is '2'"),
        ({"classes": 3}, "2 categories for 3 classes"),
        ({"categories": [[1, 2], [3, "b"]]}, "its category"),
        ({"batch": [1, 8]}, "batch is"),
        ({"box_values": 5}, "box_values is 5"),
        ({"score_threshold": None}, "score_threshold is None"),
        ({"nms_threshold": 10**400}, "nms_threshold is"),
        ({"top_n": -1}, "top_n is -1"),
        ({"input_type": "int8"}, "input_type is 'int8'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(OdtkError, match=rf"The metadata in m\.onnx is damaged \(.*{fault}.*\): export"):
        Metadata.from_json(changed(**values), "m.onnx")


def test_good_values_are_taken() -> None:
    assert Metadata.from_json(GOOD.to_json(), "m.onnx") == GOOD
    without = json.loads(GOOD.to_json()) | {"categories": None, "format": 1}
    without["ending"] = without.pop("postprocessing")
    assert Metadata.from_json(json.dumps(without), "m.onnx").categories is None


@pytest.mark.parametrize("text", ["", "[]", "1", "null", "[" * 100_000, '{"format": "x"}', '{"format": 2}'])
def test_a_text_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(OdtkError, match=r"The metadata in m\.onnx is damaged: export the model again\."):
        Metadata.from_json(text, "m.onnx")


def test_junk_in_any_place_is_taken_or_refused() -> None:
    junk: list[Any] = ["x", None, -1, 0, 10**400, float("nan"), [1], {"a": 1}, True, [[1, 2], [3]], 2**40]
    values, generator, refused = json.loads(GOOD.to_json()), random.Random(0), 0
    for _ in range(2000):
        text = json.dumps(values | {generator.choice(list(values)): generator.choice(junk)})
        cut = text[: generator.randrange(len(text))] if generator.random() < 0.2 else text
        try:
            Metadata.from_json(cut, "m.onnx")
        except OdtkError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 1500
