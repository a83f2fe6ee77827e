"""Pictures of detections and of the ground truth: boxes and their labels on the images of a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ..config import LoaderConfig
from ..data.coco import is_degenerate, is_id, reading_fault
from ..data.dataset import Dataset
from ..data.layouts import load_annotations
from ..inference.drawing import annotate, coco_to_shapes, side_by_side
from .evaluate import check_detections, read_detections
from .pictures import PictureWriter, open_pictures


def draw_detections(detections: Iterable[dict[str, Any]], writer: PictureWriter) -> list[str]:
    """Detections (COCO results): one JPEG per image, of the image's own size. Returns the paths.

    Raises:
        OdtkError: an image cannot be decoded, or a picture cannot be written.
    """
    by_image = group_by_image(detections)
    return [
        writer.save(annotate(pixels, coco_to_shapes(by_image[image.id])), image) for image, pixels in writer.images()
    ]


def draw_results(
    path: str, data: LoaderConfig, folder: str, *, score_threshold: float, count: int | None = None
) -> list[str]:
    """Detections of a file of COCO results: one JPEG per image. Returns the paths.

    With annotations, the ground truth is on the left of each picture.

    Args:
        path: COCO results.
        score_threshold: only detections above it are drawn.
        count: images to draw, the first ones; None: all.

    Raises:
        OdtkError: the file, the dataset or the folder cannot be used; the sentence says what to do.
    """
    writer = open_pictures(data, folder)
    by_image = group_by_image(d for d in read_checked_detections(path, writer.dataset) if d["score"] > score_threshold)
    truth, names = read_ground_truth(data, writer.dataset.rotated) if data.annotations else (group_by_image(()), {})
    written = []
    for image, pixels in writer.images(count):
        picture = annotate(pixels, coco_to_shapes(by_image[image.id], names))
        if data.annotations:
            picture = side_by_side(annotate(pixels, coco_to_shapes(truth[image.id], names)), picture)
        written.append(writer.save(picture, image))
    return written


def draw_ground_truth(data: LoaderConfig, folder: str, *, count: int | None = None) -> list[str]:
    """Annotations as the file states them: one JPEG per image. Returns the paths.

    Crowds are drawn too; degenerate boxes, which training drops, are not.

    Args:
        data: with annotations.
        count: images to draw, the first ones; None: all.

    Raises:
        OdtkError: the dataset or the folder cannot be used; the sentence says what to do.
    """
    assert data.annotations
    writer = open_pictures(data, folder)
    truth, names = read_ground_truth(data, writer.dataset.rotated)
    return [
        writer.save(annotate(pixels, coco_to_shapes(truth[image.id], names)), image)
        for image, pixels in writer.images(count)
    ]


def read_checked_detections(path: str, dataset: Dataset) -> list[dict[str, Any]]:
    """The detections of a file of COCO results, of images of a dataset and of any category.

    Raises:
        OdtkError: the same as from `odtk evaluate`, for the first that is malformed or of an unknown image.
    """
    found = read_detections(path)
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    categories = {id for entry in entries if is_id(id := entry.get("category_id"))}
    ids = {"images": [image.id for image in dataset.images], "categories": categories}
    check_detections(found, {what: [{"id": id} for id in known] for what, known in ids.items()}, path)
    return found


def read_ground_truth(data: LoaderConfig, rotated: bool) -> tuple[dict[int, list[dict[str, Any]]], dict[int, str]]:
    """Annotations by image id, without degenerate boxes, and category names by id.

    They have been read by Dataset.load before, which refuses malformed ones.
    """
    assert data.annotations
    content = load_annotations(data.annotations, data.images, rotated=rotated).content
    names = {c["id"]: str(c.get("name", c["id"])) for c in content.get("categories", [])}
    entries = [entry for entry in content.get("annotations", []) if not reading_fault(entry)]  # of a damaged image
    return group_by_image(entry for entry in entries if not is_degenerate(entry["bbox"])), names


def group_by_image(entries: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """COCO annotations or results by their image id; an empty list for an image without any."""
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_image[entry["image_id"]].append(entry)
    return by_image
