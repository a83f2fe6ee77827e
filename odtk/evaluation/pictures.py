"""The images of a dataset that pictures are made of, and the folder that the pictures are written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image as PILImage

from ..config import LoaderConfig, ModelConfig, OdtkError
from ..data.batch import Batch
from ..data.dataset import Dataset
from ..data.images import ImageError
from ..data.layouts import load_annotations
from ..data.loader import create_loader
from ..data.records import Image
from ..data.sampler import round_up
from ..files import make_folder
from ..model.detector import Detector


@dataclass(frozen=True)
class PictureWriter:
    """A dataset, read once, and the folder for the pictures of its images.

    Attributes:
        dataset: the images to draw on.
        folder: where the pictures go; it exists.
        originals: the files of the dataset's images, which no picture may replace.
        skip_damaged: an image that cannot be decoded gets no picture.
    """

    dataset: Dataset
    folder: Path
    originals: frozenset[Path]
    skip_damaged: bool = False

    def images(self, count: int | None = None) -> Iterator[tuple[Image, PILImage.Image]]:
        """The first ``count`` images (None: all) and their RGB pixels, turned as their boxes are.

        Raises:
            OdtkError: an image cannot be decoded, and damaged images are not skipped.
        """
        for image in self.dataset.images[:count]:
            try:
                yield image, PILImage.fromarray(image.decode())
            except ImageError as error:
                if self.skip_damaged:
                    continue
                raise OdtkError(f"Cannot draw on {image.path}: {error}.") from error

    def save(self, picture: PILImage.Image, image: Image, suffix: str = ".jpg") -> str:
        """Writes the picture of an image as NAME_ID + suffix, and returns its path.

        Raises:
            OdtkError: the file is an image of the dataset, or cannot be written.
        """
        path = self.folder / f"{image.path.stem}_{image.id}{suffix}"
        if path.resolve() in self.originals:
            raise OdtkError(f"{path} is an image of the dataset: choose another folder for the pictures.")
        try:
            picture.save(path, quality=92)  # for JPEG; PNG ignores it
        except OSError as error:
            raise OdtkError(f"Cannot write {path}: {error.strerror or error}.") from error
        return str(path)


def open_pictures(data: LoaderConfig, folder: str, *, rotated: bool | None = None) -> PictureWriter:
    """Reads a dataset and creates the folder for its pictures.

    Args:
        rotated: whether the boxes are rotated; None: they are if any box of the annotations has an angle.

    Raises:
        OdtkError: the dataset is faulty, the folder cannot be created, or it lies among the images, where the next
            run would take the pictures for images.
    """
    target = Path(folder).resolve()
    listed = data.annotations is None  # then every image in the folder and its subfolders belongs to the dataset
    for source in [data.images] if isinstance(data.images, str) else data.images:
        images = Path(source).expanduser().resolve()
        if target == images or listed and images in target.parents:
            raise OdtkError(f"Pictures in {folder} would lie among the images of {source}: choose another folder.")
    if rotated is None:
        rotated = data.annotations is not None and has_angles(data.annotations, data.images)
    dataset = Dataset.load(data.annotations, data.images, rotated=rotated, skip_damaged=data.skip_damaged)
    originals = frozenset(image.path.resolve() for image in dataset.images)
    return PictureWriter(dataset, make_folder(folder), originals, data.skip_damaged)


def has_angles(annotations: str, images: str | Sequence[str]) -> bool:
    """Whether any box of some annotations has five numbers."""
    entries = load_annotations(annotations, images).content.get("annotations", [])
    return any(isinstance(entry.get("bbox"), list) and len(entry["bbox"]) == 5 for entry in entries)


def network_inputs(
    detector: Detector, dataset: Dataset, data: LoaderConfig, count: int
) -> Iterator[tuple[Image, Batch]]:
    """The first ``count`` images as the detector gets them in inference: resized, padded, normalized, one per batch."""
    size = round_up(data.size, detector.stride) if data.size else None
    config = detector.config
    data = replace(
        data, batch=1, training=False, size=size, stride=detector.stride, rotated=config.rotated, **config.pixels
    )
    dataset = replace(dataset, images=dataset.images[:count])
    by_id = {image.id: image for image in dataset.images}
    for batch in create_loader(dataset, data):
        yield by_id[int(batch.ids[0])], batch


def input_picture(batch: Batch, model: ModelConfig) -> PILImage.Image:
    """The first image of a batch as RGB, its normalization undone."""
    mean, std = torch.tensor(model.mean)[:, None, None], torch.tensor(model.std)[:, None, None]
    pixels = ((batch.images[0].cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    return PILImage.fromarray(pixels.permute(1, 2, 0).numpy())  # [3, H, W] → [H, W, 3]
