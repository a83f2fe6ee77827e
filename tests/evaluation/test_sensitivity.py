"""How much detections change, and which layer changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from odtk.evaluation.sensitivity import detection_change, measure_layer_costs
from odtk.exporting.calibration_table import CalibrationTable
from odtk.exporting.precision import quantizable_layers
from odtk.postprocess import BatchDetections

BOX = (10.0, 10.0, 49.0, 49.0)  # 40×40 pixels


def detections(*rows: tuple[float, tuple[float, ...], int], size: int = 4) -> BatchDetections:
    """(score, box, class) rows of one image, and unused rows up to ``size``."""
    unused = [(0.0, (0.0,) * len(rows[0][1] if rows else BOX), 0)] * (size - len(rows))
    scores, boxes, classes = zip(*rows, *unused, strict=True)
    return BatchDetections(torch.tensor([scores]), torch.tensor([boxes]), torch.tensor([classes]))


def change(expected: BatchDetections, actual: BatchDetections) -> float:
    assert detection_change([expected], [actual], 0.05) == pytest.approx(detection_change([actual], [expected], 0.05))
    return detection_change([expected], [actual], 0.05)


def test_the_same_detections_are_no_change_and_others_are_all_of_it() -> None:
    found = detections((0.9, BOX, 1), (0.4, (60.0, 10.0, 79.0, 39.0), 0))
    assert change(found, found) == pytest.approx(0)
    assert change(found, detections()) == 100
    assert change(found, detections((0.9, BOX, 0))) == 100  # another class
    assert change(detections(), detections()) == 0


def test_scores_and_boxes_count_alike() -> None:
    """A tenth of a score above the threshold, or an IoU of 0.9, is a tenth of a detection."""
    whole = detections((0.55, BOX, 1))
    assert change(whole, detections((0.5, BOX, 1))) == pytest.approx(10, abs=1e-3)
    assert change(whole, detections((0.55, (10.0, 10.0, 49.0, 45.0), 1))) == pytest.approx(10, abs=1e-3)


def test_a_detection_at_the_threshold_may_come_and_go() -> None:
    strong, weak = (0.95, BOX, 1), (0.051, (60.0, 10.0, 79.0, 39.0), 0)
    assert change(detections(strong, weak), detections(strong)) == pytest.approx(0.11, abs=0.01)
    full = detections(strong, weak, size=2)  # a third may have been cut off at 0.051
    assert change(full, detections(strong, (0.051, BOX, 0), size=2)) == pytest.approx(0)


def test_each_detection_has_one_partner_and_images_are_added() -> None:
    twice = detections((0.55, BOX, 1), (0.55, BOX, 1))
    once = detections((0.55, BOX, 1))
    assert change(twice, once) == pytest.approx(50)
    assert detection_change([twice, once], [twice, detections()], 0.05) == pytest.approx(100 / 3)


def test_rotated_boxes_are_compared_as_polygons() -> None:
    upright, turned = (*BOX, 0.0, 1.0), (*BOX, 0.7071068, 0.7071068)  # by 45 degrees: IoU 0.707
    found = change(detections((0.55, upright, 1)), detections((0.55, turned, 1)))
    assert found == pytest.approx(100 * (1 - 0.7071), abs=0.1)


def scores_of(outputs: Sequence[np.ndarray]) -> BatchDetections:
    """One detection per channel of the first output, whose mean is its score; the second output moves the boxes."""
    scores = torch.from_numpy(outputs[0]).mean((2, 3)).sigmoid()
    order = scores[0].argsort(descending=True)
    shift = torch.from_numpy(outputs[1]).mean()
    boxes = (torch.tensor(BOX) + shift).expand(1, len(order), 4)
    return BatchDetections(scores[:, order], boxes, order[None])


def two_heads(spoiled: str) -> onnx.ModelProto:
    """A convolution ``stem``, and ``cls`` and ``box`` that read it; INT8 rounds most weights of one of them to 0."""
    generator = np.random.default_rng(0)
    weights = {
        name: generator.standard_normal((4, 4 if name != "stem" else 3, 1, 1)) for name in ("stem", "cls", "box")
    }
    weights["stem"][0] = 0  # the channel that the large weights multiply
    weights[spoiled][:, 0] = 1000
    nodes = [
        helper.make_node("Conv", ["images", "stem.weight"], ["stem"], "stem"),
        helper.make_node("Conv", ["stem", "cls.weight"], ["logits_0"], "cls"),
        helper.make_node("Conv", ["stem", "box.weight"], ["boxes_0"], "box"),
    ]
    names = (("images", 3), ("logits_0", 4), ("boxes_0", 4))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, c, 8, 8]) for name, c in names]
    constants = [numpy_helper.from_array(value.astype(np.float32), f"{name}.weight") for name, value in weights.items()]
    graph = helper.make_graph(nodes, "heads", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("spoiled", ["cls", "box"])
def test_a_layer_that_reaches_one_kind_of_output_is_not_hidden_by_the_other(spoiled: str) -> None:
    model = two_heads(spoiled)
    table = CalibrationTable("m", (8, 8), "minmax", (), {"images": 0.03, "stem": 0.05})
    images = [np.random.default_rng(i).standard_normal((1, 3, 8, 8)).astype(np.float32) + 1 for i in range(3)]
    costs = measure_layer_costs(model, table, images, scores_of, 0.05)
    assert set(costs) == set(quantizable_layers(model)) and list(costs.values()) == sorted(costs.values(), reverse=True)
    assert list(costs)[0] == spoiled and costs[spoiled] > 5 * list(costs.values())[1]
    without = measure_layer_costs(model, dataclasses.replace(table, fp16_layers=(spoiled,)), images, scores_of, 0.05)
    assert without == costs  # what the table keeps in FP16 is measured too
