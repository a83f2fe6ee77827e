"""From raw levels to detections: planted objects are found, and each setting has its effect."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from odtk import boxes as geometry
from odtk import ops
from odtk.box_coder import BOX_CODERS
from odtk.config import LossConfig, ModelConfig, PostprocessConfig
from odtk.postprocess import BatchDetections, postprocess
from odtk.training.loss import detection_loss

STRIDES = (8, 16)
SHAPES = ((8, 10), (4, 5))  # 80 × 64 px
ANCHOR = torch.tensor([0.0, -4.0, 7.0, 11.0])  # 8 × 16 px about the first cell's center
KINDS = ["retinanet", "rotated", "fcos", "dense", "rotated dense"]


def model_config(kind: str) -> ModelConfig:
    """One anchor per cell, three classes."""
    one = ModelConfig(classes=3, ratios=(1.0,), scales=(1.0,))
    _, rotated, head = kind.rpartition("rotated ")
    if head in ("fcos", "dense"):
        return dataclasses.replace(one, head=head, angles=(0.0,) if rotated else ())
    return dataclasses.replace(one, angles=(0.0,) if kind == "rotated" else ())


def anchors_of(model: ModelConfig) -> list[Tensor]:
    if model.anchor_free:
        return [torch.tensor([[0.0, 0.0, s - 1.0, s - 1.0]]) for s in STRIDES]
    return [torch.cat([ANCHOR, torch.zeros(int(model.rotated))])[None] for _ in STRIDES]


def empty_heads(model: ModelConfig, n: int) -> tuple[list[Tensor], list[Tensor]]:
    logits = [torch.full((n, model.classes, *shape), -10.0) for shape in SHAPES]
    return logits, [torch.zeros(n, BOX_CODERS[model.box_coder].head_values, *shape) for shape in SHAPES]


def plant(
    heads,
    model: ModelConfig,
    *,
    image: int,
    level: int,
    cell: tuple[int, int],
    box: list[float],
    label: int,
    logit: float,
) -> None:
    """Writes what the heads would give for this box [4 or 5] at the cell (y, x)."""
    y, x = cell
    s = STRIDES[level]
    target = torch.tensor(box)
    heads[0][level][image, label, y, x] = logit
    if model.anchor_free and model.rotated:
        center, size = geometry.center_and_size(target)
        offset = center - torch.tensor([(x + 0.5) * s, (y + 0.5) * s])
        twice = 2 * target[4:]
        numbers = torch.cat([offset / s, size / s, 0.7 * torch.sin(twice), 0.7 * torch.cos(twice)])
    elif model.anchor_free:
        px, py = (x + 0.5) * s, (y + 0.5) * s
        x1, y1, x2, y2 = box
        distances = [(px - x1) / s, (py - y1) / s, (x2 + 1 - px) / s, (y2 + 1 - py) / s]
        numbers = torch.tensor([*distances, 20.0] if model.head == "fcos" else distances)
    else:
        anchor = anchors_of(model)[level][0] + torch.tensor([x * s, y * s, x * s, y * s, 0.0])[: len(box)]
        numbers = (geometry.encode_rotated if model.rotated else geometry.encode)(target, anchor)
    heads[1][level][image, :, y, x] = numbers


def run(heads, model: ModelConfig, **settings) -> BatchDetections:
    config = PostprocessConfig(**settings)
    return postprocess(*heads, anchors=anchors_of(model), strides=STRIDES, model=model, config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_objects_come_out(kind: str) -> None:
    """Two classes, two levels, a near copy that is suppressed, and an image without objects."""
    model = model_config(kind)
    heads = empty_heads(model, 2)
    angle = [0.3] if model.rotated else []
    first, near, other = [16.0, 8.0, 39.0, 31.0], [17.0, 8.0, 40.0, 31.0], [30.0, 20.0, 69.0, 59.0]
    plant(heads, model, image=1, level=0, cell=(2, 3), box=first + angle, label=2, logit=2.0)
    plant(heads, model, image=1, level=0, cell=(2, 2), box=near + angle, label=2, logit=1.0)
    plant(heads, model, image=1, level=1, cell=(2, 3), box=other + angle, label=0, logit=3.0)
    found = run(heads, model, detections=7)

    assert found.scores.shape == found.classes.shape == (2, 7)
    assert found.boxes.shape == (2, 7, 6 if model.rotated else 4)
    assert not found.scores[0].any() and not found.boxes[0].any() and not found.classes[0].any()
    assert (found.scores[1] > 0).sum() == 2
    assert found.classes[1, :2].tolist() == [0, 2]
    expected = torch.tensor([3.0, 2.0]).sigmoid()
    assert torch.allclose(found.scores[1, :2], expected.sqrt() if model.head == "fcos" else expected, atol=1e-6)
    assert torch.allclose(found.boxes[1, :2, :4], torch.tensor([other, first]), atol=1e-3)
    if model.rotated:
        assert torch.allclose(torch.atan2(found.boxes[1, :2, 4], found.boxes[1, :2, 5]), torch.tensor(0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_setting_has_its_effect(kind: str) -> None:
    model = model_config(kind)
    heads = [[torch.randn_like(level) for level in part] for part in empty_heads(model, 1)]

    def count(**settings) -> int:
        return int((run(heads, model, **settings).scores > 0).sum())

    usual = count()
    assert count(score_threshold=0.7) < usual
    assert count(nms_threshold=0.1, detections=999) < count(nms_threshold=0.9, detections=999)
    assert count(detections=3) == 3
    assert count(top_n=1) <= len(STRIDES)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_what_the_class_promises(kind: str) -> None:
    model = model_config(kind)
    logits, boxes = ([torch.randn_like(level) for level in part] for part in empty_heads(model, 3))
    logits[0][1], logits[1][1] = -10, -10
    found = run((logits, boxes), model)
    types = [getattr(found, part.name).dtype for part in dataclasses.fields(found)]
    assert types == [torch.float32, torch.float32, torch.int64]
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    unused = found.scores == 0
    assert unused[1].all() and not unused[0].all()
    assert not found.boxes[unused].any() and not found.classes[unused].any()
    if kind == "rotated dense":  # a rotated box may reach beyond the image
        center = geometry.center_and_size(found.boxes[~unused])[0]
        assert (center >= 0).all() and (center <= torch.tensor([80.0, 64.0])).all()
        return
    limits = torch.tensor([79.0, 63.0, 79.0, 63.0])
    assert (found.boxes[..., :4] >= 0).all() and (found.boxes[..., :4] <= limits).all()


@pytest.mark.parametrize("kind", ["rotated", "rotated dense"])
def test_a_rotated_pair_is_judged_by_its_polygons(kind: str) -> None:
    """Two bars crossed at 90°: their circumscribed boxes are nearly the same, but their polygons overlap little."""
    model = model_config(kind)
    heads = empty_heads(model, 1)
    bar = [20.0, 28.0, 59.0, 35.0]
    plant(heads, model, image=0, level=0, cell=(3, 4), box=[*bar, math.pi / 4], label=1, logit=2.0)
    plant(heads, model, image=0, level=0, cell=(4, 4), box=[*bar, -math.pi / 4], label=1, logit=1.0)
    assert (run(heads, model).scores > 0).sum() == 2
    plant(heads, model, image=0, level=0, cell=(4, 4), box=[*bar, math.pi / 4 + 0.02], label=1, logit=1.0)
    assert (run(heads, model).scores > 0).sum() == 1


@pytest.mark.parametrize("kind", ["retinanet", "rotated", "fcos", "rotated dense"])
def test_what_the_loss_teaches_is_what_postprocess_reads(kind: str) -> None:
    """Raw levels that minimize the loss decode to the targets: both sides agree on layout, anchors and coding."""
    model = model_config(kind)
    angle = [0.2] if model.rotated else []
    boxes = torch.tensor([[[8.0, 8.0, 17.0, 25.0, *angle], [46.0, 30.0, 55.0, 47.0, *angle]]] * 2)
    labels = torch.tensor([[2, 0], [1, -1]])  # the second box of the second image is padding
    logits, numbers = empty_heads(model, 2)
    for part, value in ((logits, -3.0), (numbers, 0.5)):
        for level in part:
            level.fill_(value).requires_grad_()
    optimizer = torch.optim.Adam(logits + numbers, lr=0.2)
    for _ in range(60):
        found = detection_loss(
            logits, numbers, boxes, labels, anchors=anchors_of(model), strides=STRIDES, model=model, loss=LossConfig()
        )
        optimizer.zero_grad()
        torch.stack([total / normalizer.clamp(min=1) for total, normalizer in found.values()]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        detections = run((logits, numbers), model, score_threshold=0.5)
    for image, used in enumerate([2, 1]):
        assert (detections.scores[image] > 0).sum() == used
        order = detections.classes[image, :used].argsort(descending=True)
        assert detections.classes[image, order].tolist() == labels[image, :used].tolist()
        if kind == "rotated dense":  # the same box in the form of its longer side: turned by 90°, sides swapped
            overlap = ops.rotated_iou(detections.boxes[image, order], boxes[image, :used])
            assert (overlap.diagonal() > 0.9).all()
            sin, cos = detections.boxes[image, order, 4:].unbind(-1)
            assert torch.allclose(torch.atan2(sin, cos), torch.tensor(0.2 + math.pi / 2), atol=0.05)
            continue
        assert torch.allclose(detections.boxes[image, order, :4], boxes[image, :used, :4], atol=1.0)
        if model.rotated:
            sin, cos = detections.boxes[image, order, 4:].unbind(-1)
            assert torch.allclose(torch.atan2(sin, cos), torch.tensor(0.2), atol=0.05)
