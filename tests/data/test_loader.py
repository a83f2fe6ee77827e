"""Order, shards, resuming, geometry and damage; the torch loader's pixels against plain arithmetic."""

import math
import sys
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from odtk.categories import Category
from odtk.config import AugmentConfig, LoaderConfig, OdtkError
from odtk.data import batch as batch_module
from odtk.data.batch import PREFETCH, Batch
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.data.records import Fault, Image
from odtk.data.render import render
from odtk.data.sampler import Sample, Sampler, color_matrix, input_size, random_crop, random_view, repeat_factors
from odtk.data.torch_loader import TorchLoader
from odtk.model.detector import normalize

STILL = AugmentConfig(flip=0, crop=0, brightness=0, contrast=0, hue=0, saturation=0)
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def records(count: int, width: int = 40, height: int = 30, boxes: int = 2) -> Dataset:
    """Images without files, which is enough for the sampler."""
    generator = np.random.default_rng(0)
    images = []
    for i in range(count):
        size = generator.uniform(4, 12, (boxes, 2))
        corner = generator.random((boxes, 2)) * ((width, height) - size)
        labels = generator.integers(0, 2, boxes)
        images.append(Image(100 + i, Path(f"{i}.jpg"), width, height, np.concatenate([corner, size], axis=1), labels))
    return Dataset(images, (Category(1, "a"), Category(5, "b")))


@pytest.fixture
def files(tmp_path: Path) -> Dataset:
    """Six PNG files of noise in two sizes, each with one box except the last."""
    generator = np.random.default_rng(1)
    images = []
    for i in range(6):
        width, height = (40, 30) if i % 2 else (24, 50)
        pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        PILImage.fromarray(pixels).save(tmp_path / f"{i}.png")
        boxes = np.array([[3.0, 4, 10, 12]]) if i < 5 else np.zeros((0, 4))
        images.append(Image(i + 1, tmp_path / f"{i}.png", width, height, boxes, np.zeros(len(boxes), np.int64)))
    return Dataset(images, (Category(1, "a"),))


def config(**changes) -> LoaderConfig:
    return replace(LoaderConfig("images", loader="torch", resize=32, max_size=64, jitter=(24, 48)), **changes)


def seen(dataset: Dataset, settings: LoaderConfig, batches: int) -> list[int]:
    sampler = Sampler(dataset, settings)
    return [sample.image.id for number in range(batches) for sample in sampler.plan(number).samples]


@pytest.mark.parametrize(("count", "batch", "world"), [(10, 2, 1), (10, 3, 1), (13, 2, 2), (7, 4, 3), (3, 4, 2)])
def test_each_image_once_per_epoch_over_all_ranks(count, batch, world) -> None:
    dataset = records(count)
    batches = 3 * count
    ranks = [seen(dataset, config(training=True, batch=batch, rank=r, world=world), batches) for r in range(world)]
    assert len({len(ids) for ids in ranks}) == 1  # no rank waits for another
    stream = [id for number in range(batches) for ids in ranks for id in ids[number * batch : (number + 1) * batch]]
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == [100 + i for i in range(count)]
    assert stream[:count] != stream[count : 2 * count] or count < 4  # shuffled again
    assert len(Sampler(dataset, config(training=True, batch=batch, world=world))) == math.ceil(count / batch / world)


@pytest.mark.parametrize(("count", "batch", "world"), [(10, 4, 1), (10, 4, 3), (2, 4, 3)])
def test_no_image_lost_or_doubled_in_inference(count, batch, world) -> None:
    dataset = records(count)
    ids = []
    for rank in range(world):
        settings = config(batch=batch, rank=rank, world=world)
        ids += seen(dataset, settings, len(Sampler(dataset, settings)))
    assert sorted(ids) == [100 + i for i in range(count)]


def test_order_depends_on_the_seed_alone() -> None:
    dataset = records(12)
    assert seen(dataset, config(training=True, seed=1), 12) == seen(dataset, config(training=True, seed=1), 12)
    assert seen(dataset, config(training=True, seed=1), 12) != seen(dataset, config(training=True, seed=2), 12)


def rare() -> Dataset:
    """Ten images: class 0 is in all but the last, class 1 in the first, class 2 in the first two, class 3 in none."""
    dataset = records(10)
    labels = [[0, 1, 2], [0, 2, 2]] + [[0]] * 7 + [[]]
    for image, of_image in zip(dataset.images, labels, strict=True):
        image.labels = np.array(of_image, dtype=np.int64)
        image.boxes = np.tile([3.0, 4, 10, 12], (len(of_image), 1))
    return Dataset(dataset.images, tuple(Category(i, str(i)) for i in range(4)))


def test_repeat_factors_by_hand() -> None:
    # Fractions 0.9, 0.1 and 0.2; √(0.4 / 0.1) = 2, √(0.4 / 0.2) = √2; an image takes the largest of its classes.
    factors = repeat_factors(rare(), 0.4)
    assert factors is not None
    np.testing.assert_allclose(factors, [2, 2**0.5] + [1] * 8)
    assert repeat_factors(rare(), 0) is None and repeat_factors(rare(), 0.1) is None


def epochs_of(sampler: Sampler, count: int) -> list[Counter]:
    """How often each image comes, by epoch; the last epochs of the stream may be incomplete."""
    epochs: dict[int, Counter] = {}
    for number in range(count):
        for epoch, index, _ in sampler._stream(number):
            epochs.setdefault(epoch, Counter())[index] += 1
    return [epochs[epoch] for epoch in sorted(epochs)]


def test_rare_classes_are_repeated() -> None:
    settings = config(training=True, batch=4, repeat_threshold=0.4)
    epochs = epochs_of(Sampler(rare(), settings), 1200)[:-1]
    assert len(epochs) > 400
    assert all(epoch[0] == 2 and epoch[1] in (1, 2) for epoch in epochs), "2 is whole, √2 is rounded up or down"
    assert all(epoch[index] == 1 for epoch in epochs for index in range(2, 10))
    assert abs(sum(epoch[1] for epoch in epochs) / len(epochs) - 2**0.5) < 0.08
    assert len(Sampler(rare(), settings)) == math.ceil((2 + 2**0.5 + 8) / 4)


def test_repeats_are_the_same_over_ranks_and_after_a_resume(files) -> None:
    settings = config(training=True, batch=4, repeat_threshold=0.4)
    whole = [draw for number in range(40) for draw in Sampler(rare(), settings)._stream(number)]
    shared: list[tuple[int, int, int]] = []
    samplers = [Sampler(rare(), replace(settings, batch=2, rank=rank, world=2)) for rank in (0, 1)]
    for number in reversed(range(40)):  # whatever was asked before
        shared[:0] = [draw for sampler in samplers for draw in sampler._stream(number)]
    assert shared == whole
    dataset = Dataset(files.images, tuple(Category(i, str(i)) for i in range(2)))
    dataset.images[0].labels = np.ones(1, np.int64)
    settings = config(training=True, batch=4, repeat_threshold=0.9)
    uninterrupted = list(islice(create_loader(dataset, settings), 6))
    first = create_loader(dataset, settings)
    list(islice(first, 2))
    resumed = create_loader(dataset, settings)
    resumed.restore(first.state())
    assert all(equal(a, b) for a, b in zip(uninterrupted[2:], islice(resumed, 4), strict=True))


def test_repetitions_in_an_epoch_are_augmented_differently() -> None:
    settings = config(training=True, batch=4, repeat_threshold=0.4, augment=replace(STILL, brightness=0.5, flip=0.5))
    sampler = Sampler(rare(), settings)
    colors: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for number in range(30):
        samples = sampler.plan(number).samples
        for (epoch, index, repetition), sample in zip(sampler._stream(number), samples, strict=True):
            colors.setdefault((epoch, index), []).append((repetition, float(sample.color[0, 0])))
    twice = [found for (_, index), found in colors.items() if index == 0 and len(found) == 2]
    assert len(twice) > 5
    for (a, color_a), (b, color_b) in twice:
        assert {a, b} == {0, 1} and color_a != color_b


def test_without_rare_classes_nothing_changes() -> None:
    settings = config(training=True, batch=4)
    assert Sampler(rare(), replace(settings, repeat_threshold=0.1)).factors is None
    assert seen(rare(), settings, 9) == seen(rare(), replace(settings, repeat_threshold=0.1), 9)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in Batch.__dataclass_fields__)


def test_resume_gives_the_batches_that_would_have_been(files) -> None:
    settings = config(training=True, batch=4, workers=2)
    first = create_loader(files, settings)
    batches = list(islice(first, 5))
    again = create_loader(files, settings)
    for _ in islice(again, 2):
        state = again.state()
    assert state == {"seen": 8, "images": 6}  # batches prepared ahead do not count
    resumed = create_loader(files, settings)
    resumed.restore(state)
    assert all(equal(a, b) for a, b in zip(batches[2:], islice(resumed, 3), strict=True))
    assert all(equal(a, b) for a, b in zip(batches[2:], islice(again, 3), strict=True))  # a second iteration continues
    other = create_loader(files, replace(settings, batch=2, world=2))
    other.restore(state)
    assert other.state() == state


def test_resuming_with_other_images_is_said(files, capsys) -> None:
    loader = create_loader(files, config(training=True))
    capsys.readouterr()
    loader.restore({"seen": 8, "images": 6})
    loader.restore({"seen": 8})  # of a file written before
    assert capsys.readouterr().err == ""
    loader.restore({"seen": 8, "images": 7})
    assert "had 7 images and now there are 6" in capsys.readouterr().err


def test_inference_passes_repeat(files) -> None:
    passes = create_loader(files, config(batch=4))
    first, second = list(passes), list(passes)
    assert [len(b.ids) for b in first] == [4, 2] and len(passes) == 2
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(torch.cat([b.ids for b in first]).tolist()) == [1, 2, 3, 4, 5, 6]


def test_shapes_scales_and_padding(files) -> None:
    batch = next(iter(create_loader(files, config(batch=6, stride=32))))
    assert batch.images.shape == (6, 3, 64, 64) and batch.images.dtype == torch.float32
    # 24×50 → shorter side 32, longer side capped at 64: scale 64/50; 40×30 → 43×32
    assert batch.scales[0].tolist() == pytest.approx([31 / 24, 64 / 50])
    assert batch.scales[1].tolist() == pytest.approx([43 / 40, 32 / 30])
    assert batch.images[1, :, 32:].abs().max() == 0 and batch.images[1, :, :, 43:].abs().max() == 0
    assert batch.images[1, :, 31, 42].abs().max() > 0
    sx, sy = batch.scales[1].tolist()
    assert batch.boxes[1, 0].tolist() == pytest.approx([3 * sx, 4 * sy, 13 * sx - 1, 16 * sy - 1])
    assert batch.labels.tolist() == [[0]] * 5 + [[-1]] and batch.boxes[5].abs().max() == 0
    assert batch.boxes.shape == (6, 1, 4)


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_size_means_fitted_inside_and_padded_to_exactly_it(files, size) -> None:
    for batch in create_loader(files, config(batch=2, size=size)):
        assert batch.images.shape[2:] == size
    scale = min(size[0] / 30, size[1] / 40)
    assert batch.scales[1].tolist() == pytest.approx([round(40 * scale) / 40, round(30 * scale) / 30])


def test_normalization_without_scaling_is_exact(files) -> None:
    settings = config(batch=1, resize=30, max_size=40, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    batch = list(create_loader(files, settings))[1]
    pixels = np.asarray(PILImage.open(files.images[1].path)).astype(np.float32) / 255
    expected = (pixels - settings.mean) / settings.std
    assert np.allclose(batch.images[0, :, :30, :40].permute(1, 2, 0), expected, atol=1e-5)
    assert batch.images[0, :, 30:].abs().max() == 0


def test_black_padding_is_what_black_pixels_become(files) -> None:
    settings = config(batch=1, resize=30, max_size=40, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), padding="black")
    batch = list(create_loader(files, settings))[1]
    below = batch.images[0, :, 30:]
    assert below.numel()
    expected = torch.tensor([-0.1 / 0.5, -0.2 / 0.6, -0.3 / 0.7])[:, None, None]
    torch.testing.assert_close(below, expected.expand_as(below))


@pytest.mark.parametrize("padding", ["mean", "black"])
def test_batches_of_pixels_are_the_normalized_ones_before_normalization(files, padding) -> None:
    """To the bit inside the images; beyond them uint8 has the nearest pixel of what is 0 once normalized."""
    settings = config(batch=6, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), padding=padding)
    whole, integers, floats = (
        next(iter(create_loader(files, replace(settings, input_type=kind)))).images
        for kind in ("normalized", "uint8", "float32")
    )
    assert integers.dtype == torch.uint8 and floats.dtype == torch.float32
    torch.testing.assert_close(normalize(floats, settings.mean, settings.std), whole, atol=1e-6, rtol=0)
    inside = (slice(1, 2), slice(None), slice(32), slice(43))  # of 64×64
    assert torch.equal(integers[inside].float(), floats[inside]) and integers[inside].float().std() > 30
    expected = torch.tensor([25.5, 51.0, 76.5] if padding == "mean" else [0.0, 0.0, 0.0])
    torch.testing.assert_close(floats[1, :, 63, 63], expected)
    assert integers[1, :, 63, 63].tolist() == ([26, 51, 76] if padding == "mean" else [0, 0, 0])  # 25.5 → even


def test_uint8_is_for_inference(files) -> None:
    with pytest.raises(ValueError, match="uint8"):
        create_loader(files, config(training=True, input_type="uint8"))


def test_what_a_rotation_shows_beyond_a_black_image_is_black(tmp_path) -> None:
    PILImage.new("RGB", (40, 30)).save(tmp_path / "black.png")
    dataset = Dataset([Image(1, tmp_path / "black.png", 40, 30, np.zeros((0, 4)), np.zeros(0, int))], ())
    turned = replace(STILL, free_rotate=(30.0, 30.0))
    settings = config(batch=1, training=True, jitter=(30, 30), max_size=40, augment=turned, padding="black")
    images = next(iter(create_loader(dataset, settings))).images
    black = torch.tensor([-m / s for m, s in zip(settings.mean, settings.std, strict=True)])[:, None, None]
    torch.testing.assert_close(images[0], black.expand_as(images[0]), atol=1e-5, rtol=0)


def test_jitter_is_inclusive_and_common_to_the_ranks() -> None:
    dataset = records(8, width=40, height=40)
    settings = config(training=True, jitter=(30, 32), augment=STILL)
    sizes = Counter(Sampler(dataset, settings).plan(k).samples[0].view.size[0] for k in range(60))
    assert set(sizes) == {30, 31, 32}
    for k in range(10):
        ranks = [Sampler(dataset, replace(settings, rank=r, world=2)).plan(k).samples[0].view.size for r in range(2)]
        assert ranks[0] == ranks[1]


def test_the_crop_keeps_a_box() -> None:
    dataset = records(1, width=400, height=300, boxes=3)
    image = dataset.images[0]
    generator = np.random.default_rng(0)
    windows = [random_crop(generator, image) for _ in range(200)]
    assert len(set(windows)) > 50 and (0, 0, 400, 300) in windows
    for x1, y1, x2, y2 in windows:
        assert 0 <= x1 < x2 <= 400 and 0 <= y1 < y2 <= 300
        center = image.boxes[:, :2] + image.boxes[:, 2:] / 2
        assert ((center >= (x1, y1)) & (center < (x2, y2))).all(axis=1).any()
    image.boxes = image.boxes[:0]
    assert random_crop(generator, image) == (0, 0, 400, 300)


@pytest.mark.parametrize("factor", [0.001, 0.5, 1.0, 1.3, 2.0, 500.0])
def test_a_view_keeps_its_frame(factor) -> None:
    generator = np.random.default_rng(0)
    window, frame = (10, 20, 74, 68), (128, 96)
    views = [random_view(generator, window, frame, (factor, factor * 1.0000001), np.zeros((0, 4))) for _ in range(60)]
    for view in views:
        (x1, y1, x2, y2), (width, height), (x, y) = view.crop, view.size, view.place
        assert view.frame == frame
        assert 10 <= x1 < x2 <= 74 and 20 <= y1 < y2 <= 68
        assert 0 <= x <= 128 - width and 0 <= y <= 96 - height
        shrunk, enlarged = min(1.0, factor), max(1.0, factor)
        assert (width, height) == (max(1, round(128 * shrunk)), max(1, round(96 * shrunk)))
        assert (x2 - x1, y2 - y1) == (max(1, round(64 / enlarged)), max(1, round(48 / enlarged)))
    assert (len({view.crop for view in views}) > 20) == (factor > 1)
    assert (len({view.place for view in views}) > 20) == (factor < 1)


def test_a_part_of_an_image_shows_an_object_wherever_it_lies() -> None:
    generator = np.random.default_rng(0)
    window, frame, boxes = (0, 0, 4000, 3000), (64, 48), np.array([[3990.0, 5.0, 9.0, 9.0], [30.0, 2988.0, 9.0, 11.0]])
    seen = [0, 0]
    places = set()
    for _ in range(200):
        x1, y1, x2, y2 = random_view(generator, window, frame, (20.0, 40.0), boxes).crop
        assert 0 <= x1 < x2 <= 4000 and 0 <= y1 < y2 <= 3000
        inside = [x1 <= x + w / 2 < x2 and y1 <= y + h / 2 < y2 for x, y, w, h in boxes]
        assert any(inside)
        seen = [count + one for count, one in zip(seen, inside, strict=True)]
        places.add((x1, y1))
    assert min(seen) > 60 and len(places) > 150, "either box as often, anywhere in the part"

    window = (0, 0, 300, 300)  # a crop that keeps one of two
    boxes = np.array([[10.0, 10.0, 20.0, 20.0], [700.0, 700.0, 20.0, 20.0]])
    for _ in range(200):
        x1, y1, x2, y2 = random_view(generator, window, frame, (2.0, 2.1), boxes).crop
        assert x1 <= 20 < x2 and y1 <= 20 < y2


def test_the_size_of_the_input_holds_nearly_all_images_and_is_never_empty() -> None:
    assert input_size(records(20, width=640, height=480), 300, 400, 32) == (320, 416)
    assert input_size(records(1, width=480, height=640), 300, 400, 32) == (416, 320)
    assert input_size(records(1, width=4000, height=5), 256, 320, 32) == (32, 320)


def test_scale_jitter_is_uniform_in_its_logarithm() -> None:
    settings = config(training=True, augment=replace(STILL, scale=(0.5, 2.0)), jitter=(40, 40), max_size=80)
    sampler = Sampler(records(1, width=4000, height=3000), settings)
    factors = [sampler.plan(number).samples[0].scale[0] / (40 / 3000) for number in range(300)]
    assert min(factors) < 0.55 and max(factors) > 1.8
    assert 120 < sum(factor < 1 for factor in factors) < 180


def test_boxes_follow_one_rule_when_scaled_and_cropped() -> None:
    """A box stays, clipped, if its center is seen, however the window came about."""
    dataset = records(1, width=400, height=300, boxes=40)
    for augment in (replace(STILL, scale=(1.5, 3.0)), replace(STILL, crop=1), replace(STILL, crop=1, scale=(0.5, 2.0))):
        sampler = Sampler(dataset, config(training=True, augment=augment, jitter=(300, 300), max_size=400))
        lost = 0
        for number in range(20):
            (sample,) = sampler.plan(number).samples
            x1, y1, x2, y2 = sample.view.crop
            image = dataset.images[0]
            center = image.boxes[:, :2] + image.boxes[:, 2:] / 2
            seen = ((center >= (x1, y1)) & (center < (x2, y2))).all(axis=1)
            assert sample.labels.tolist() == image.labels[seen].tolist()
            assert (sample.boxes[:, :2] >= sample.view.place).all()
            assert (sample.boxes[:, 2:] <= np.add(sample.view.place, sample.view.size) - 1 + 1e-3).all()
            lost += int((~seen).sum())
        assert lost > 0


def test_a_shrunk_image_lies_in_padding_and_keeps_its_pixels(files) -> None:
    augment = replace(STILL, scale=(0.5, 0.5))
    settings = config(training=True, augment=augment, jitter=(48, 48), max_size=200, padding="black")
    settings = replace(settings, mean=(0.5, 0.25, 0.1), std=(1.0, 1.0, 1.0))
    loader = create_loader(files, settings)
    for number in range(4):
        plan = loader.sampler.plan(number)
        (sample,), images = plan.samples, loader.render_batch(plan)
        (x, y), (width, height) = sample.view.place, sample.view.size
        assert (width, height) == ((32, 24) if sample.image.width == 40 else (24, 50))
        inner = images[0, :, y : y + height, x : x + width].clone()
        whole = np.asarray(PILImage.open(sample.image.path).resize((width, height), PILImage.Resampling.BILINEAR))
        expected = torch.from_numpy(whole.copy()).permute(2, 0, 1) / 255 - torch.tensor([0.5, 0.25, 0.1])[:, None, None]
        torch.testing.assert_close(inner, expected, atol=1e-5, rtol=0)
        images[0, :, y : y + height, x : x + width] = -torch.tensor([0.5, 0.25, 0.1])[:, None, None]
        torch.testing.assert_close(images[0], -torch.tensor([0.5, 0.25, 0.1])[:, None, None].expand_as(images[0]))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_quarter_turns_only_move_pixels(files, loader) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    settings = config(training=True, augment=replace(STILL, rotate=True), jitter=(24, 24), max_size=50, **IDENTITY)
    made = create_loader(files, replace(settings, loader=loader))
    turns = set()
    for number in range(24):
        plan = made.sampler.plan(number)
        (sample,) = plan.samples
        if sample.image.width != 24:
            continue  # is not scaled: 24 × 50
        turns.add(sample.quarter_turns)
        pixels = np.rot90(np.asarray(PILImage.open(sample.image.path)), sample.quarter_turns).copy()
        expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        found = made.render_batch(plan)[0, :, : pixels.shape[0], : pixels.shape[1]]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert turns == {0, 1, 2, 3}


def test_a_batch_under_quarter_turns_has_one_orientation() -> None:
    dataset = records(8, width=64, height=32)
    dataset.images[3] = replace(dataset.images[3], width=32, height=64, boxes=np.array([[1.0, 1, 5, 5]] * 2))
    settings = config(training=True, batch=4, augment=replace(STILL, rotate=True), jitter=(32, 32), max_size=64)
    sampler = Sampler(dataset, settings)
    seen, turns = set(), set()
    for number in range(40):
        plan = sampler.plan(number)
        assert len({sample.canvas for sample in plan.samples}) == 1
        assert (plan.width, plan.height) == plan.samples[0].canvas, "no padding"
        seen.add(plan.samples[0].canvas)
        turns |= {sample.quarter_turns for sample in plan.samples}
        other = Sampler(dataset, replace(settings, batch=2, rank=1, world=2)).plan(number)
        assert (other.width, other.height) == (plan.width, plan.height), "nor have the ranks others"
    assert seen == {(64, 32), (32, 64)} and turns == {0, 1, 2, 3}


def test_squares_turn_all_four_ways() -> None:
    settings = config(training=True, batch=8, augment=replace(STILL, rotate=True), jitter=(32, 32))
    samples = Sampler(records(8, width=32, height=32), settings).plan(0).samples
    assert len({sample.quarter_turns % 2 for sample in samples}) == 2


def marked(tmp_path: Path, rotated: bool) -> Dataset:
    """A black image with one filled white box, and its annotation."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[30:60, 50:110] = 255
    PILImage.fromarray(pixels).save(tmp_path / "marked.png")
    box = np.array([[50.0, 30, 60, 30] + [0.0] * rotated])
    image = Image(1, tmp_path / "marked.png", 160, 120, box, np.zeros(1, np.int64))
    return Dataset([image], (Category(1, "a"),), rotated=rotated)


AUGMENTS = {
    "flip": replace(STILL, flip=1),
    "crop": replace(STILL, crop=1),
    "quarter turns": replace(STILL, rotate=True),
    "crop and quarter turns": replace(STILL, crop=1, flip=0.5, rotate=True),
    "free rotation": replace(STILL, free_rotate=(-40, 40)),
    "scale": replace(STILL, scale=(0.4, 1.4)),
    "scale and quarter turns": replace(STILL, scale=(0.4, 1.4), flip=0.5, rotate=True),
    "scale and free rotation": replace(STILL, scale=(0.4, 1.1), free_rotate=(-20, 20)),
    "all": AugmentConfig(rotate=True, free_rotate=(-20, 20)),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_boxes_follow_the_pixels(tmp_path, name) -> None:
    """The augmented box encloses the white pixels closely; with a free rotation part of them may be out of sight."""
    settings = config(training=True, augment=AUGMENTS[name], jitter=(110, 130), max_size=200, **IDENTITY)
    checked = 0
    for batch in islice(create_loader(marked(tmp_path, False), settings), 12):
        if batch.labels[0, 0] < 0:
            continue  # rotated out of the canvas
        checked += 1
        ys, xs = torch.nonzero(batch.images[0, 0] > 0.5, as_tuple=True)
        found = torch.tensor([xs.min(), ys.min(), xs.max(), ys.max()], dtype=torch.float32)
        beyond = (found - batch.boxes[0, 0]) * torch.tensor([-1, -1, 1, 1])
        assert beyond.max() <= 1.5
        assert name == "all" or beyond.min() >= -1.5
    assert checked >= 8


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("absolute", [False, True])
def test_rotated_boxes_follow_the_pixels(tmp_path, name, absolute) -> None:
    """Pixels well inside the rotated box are white (of those that were in the crop), those outside are black."""
    settings = config(
        training=True,
        augment=AUGMENTS[name],
        jitter=(110, 130),
        max_size=200,
        rotated=True,
        absolute_angle=absolute,
        **IDENTITY,
    )
    checked = 0
    for batch in islice(create_loader(marked(tmp_path, True), settings), 12):
        if batch.labels[0, 0] < 0:
            continue
        x1, y1, x2, y2, theta = batch.boxes[0, 0].tolist()
        limit = math.pi if absolute else math.pi / 4
        assert abs(theta) <= limit + 1e-6
        height, width = batch.images.shape[2:]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        dx, dy = x - (x1 + x2 + 1) / 2, y - (y1 + y2 + 1) / 2
        along = math.cos(theta) * dx - math.sin(theta) * dy  # the inverse rotation
        across = math.sin(theta) * dx + math.cos(theta) * dy
        inside = torch.maximum(along.abs() - (x2 - x1 + 1) / 2, across.abs() - (y2 - y1 + 1) / 2)
        white = batch.images[0, 0] > 0.5
        assert "crop" in name or name == "all" or white[inside < -1.5].all()
        assert white[inside < -1.5].float().mean() > 0.4
        assert not white[inside > 1.5].any()
        checked += 1
    assert checked >= 8


def test_boxes_below_a_pixel_are_dropped_in_training_only(tmp_path) -> None:
    dataset = records(1, width=400, height=400, boxes=1)
    dataset.images[0].boxes = np.array([[10.0, 10, 300, 5]])
    assert len(Sampler(dataset, config(training=True, augment=STILL, jitter=(32, 32))).plan(0).samples[0].boxes) == 0
    assert len(Sampler(dataset, config()).plan(0).samples[0].boxes) == 1


def test_color_changes() -> None:
    generator = np.random.default_rng(0)
    none = color_matrix(generator, STILL)
    assert np.allclose(none, np.eye(3, 4), atol=1e-9)
    strong = color_matrix(generator, replace(STILL, hue=0.2, saturation=0.5))
    assert np.allclose(strong @ [77, 77, 77, 1], 77, atol=0.5)  # gray has neither hue nor saturation
    assert not np.allclose(strong @ [200, 50, 50, 1], [200, 50, 50], atol=5)
    contrast = color_matrix(generator, replace(STILL, contrast=0.5))
    assert np.allclose(contrast @ [128, 128, 128, 1], 128, atol=1e-6)
    brightness = color_matrix(generator, replace(STILL, brightness=0.1))
    assert np.allclose(brightness @ [10, 20, 40, 1] / brightness[0, 0], [10, 20, 40])


def test_a_damaged_image_becomes_zeros_without_boxes_and_is_named_once(files, capsys) -> None:
    path = files.images[2].path
    path.write_bytes(path.read_bytes()[:200])
    batches = [next(iter(create_loader(files, config(batch=6)))) for _ in range(2)]
    passes = create_loader(files, config(batch=6))
    for batch in [*batches, *passes, *passes]:
        assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6]  # not lost
        assert batch.images[2].abs().max() == 0 and batch.labels[2].tolist() == [-1]
        assert batch.damaged is not None and batch.damaged.tolist() == [i == 2 for i in range(6)]
        assert batch.images[1].abs().max() > 0 and batch.labels[1].tolist() == [0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("2.png" in line and "image 3" in line for line in lines)  # once per loader


def test_impossible_settings_are_one_sentence(files) -> None:
    with pytest.raises(OdtkError, match="must be multiples of the stride 32"):
        create_loader(files, config(size=(50, 64)))
    with pytest.raises(OdtkError, match="--jitter 9 3"):
        create_loader(files, config(training=True, jitter=(9, 3)))
    with pytest.raises(OdtkError, match="use dali or torch"):
        create_loader(files, config(loader="tf"))
    with pytest.raises(OdtkError, match="no images"):
        create_loader(Dataset([], ()), config())


def test_the_torch_loader_replaces_a_missing_dali(files, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "odtk.data.dali", None)
    assert isinstance(create_loader(files, config(loader="dali")), TorchLoader)
    said = capsys.readouterr().err
    assert "DALI is not available" in said and "pip install 'odtk[cuda13]'" in said


def test_only_rank_0_prints_the_counted_warnings(files, capsys) -> None:
    files.faults = [Fault("x.json", f"annotation {i}", "dropped", True, "degenerate box dropped") for i in (4, 5)]
    create_loader(files, config(rank=1, world=2))
    assert capsys.readouterr().err == ""
    create_loader(files, config())
    assert capsys.readouterr().err == "Warning: degenerate box dropped (2 ×, first x.json annotation 4)\n"


def test_batches_are_prepared_ahead_of_their_use(files, monkeypatch) -> None:
    rendered: list[Sample] = []

    def counted(sample: Sample, padding: np.ndarray) -> np.ndarray:
        rendered.append(sample)
        return render(sample, padding)

    monkeypatch.setattr(batch_module, "render", counted)
    batches = iter(create_loader(files, config(training=True, batch=1, workers=1)))
    assert isinstance(batches, Generator)
    next(batches)
    for _ in range(200):
        if len(rendered) == 1 + PREFETCH:
            break
        time.sleep(0.01)
    assert len(rendered) == 1 + PREFETCH
    batches.close()


def test_storage_that_does_not_answer_is_named(files: Dataset, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Once for a batch that waits, which comes all the same."""

    def slow(sample: Sample, padding: np.ndarray) -> np.ndarray:
        time.sleep(1.5 if sample.image.id == 3 else 0)
        return render(sample, padding)

    loader = TorchLoader(files, config(batch=2))
    whole = [batch.images for batch in loader]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(batch_module, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(batch_module, "render", slow)
    assert all(torch.equal(a, batch.images) for a, batch in zip(whole, loader, strict=True))
    said = capsys.readouterr().err.splitlines()
    path = files.images[2].path
    assert said == [f"Warning: rank 0 has waited 0.5 s for {path} and 1 other: does the storage answer?"]
