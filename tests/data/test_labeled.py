"""Images with one class each: folders and CSVs, their faults, and the squares that they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odtk.config import AugmentConfig, LoaderConfig, OdtkError
from odtk.data.dataset import Dataset
from odtk.data.labeled import list_labeled, read_labeled
from odtk.data.loader import create_loader
from odtk.data.sampler import Sampler, resized_crop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b/1.png, b/deep/2.png and a/3.jpg, of 40×30 pixels."""
    for name in ("b/1.png", "b/deep/2.png", "a/3.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    return tmp_path / "images"


def labels_of(dataset: Dataset) -> dict[str, str]:
    """The class of each file's name."""
    return {image.path.name: dataset.categories[int(image.labels[0])].name for image in dataset.images}


def csv(folder: Path, *lines: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_subfolder_is_a_class(folder: Path) -> None:
    (folder / "loose.png").write_bytes((folder / "b/1.png").read_bytes())
    (folder / ".hidden").mkdir()
    (folder / "a" / "notes.txt").write_text("no image")
    dataset = read_labeled(list_labeled(folder, None)).accepted(False)
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "a"), (2, "b")]
    assert labels_of(dataset) == {"3.jpg": "a", "1.png": "b", "2.png": "b"}
    assert all(image.boxes.tolist() == [[0, 0, 40, 30]] for image in dataset.images)
    assert [w for w in dataset.warnings() if "loose.png" in w and "outside of every class's folder" in w]


@pytest.mark.parametrize(
    "lines",
    [
        ("1.png,b", "deep/2.png,b", "../a/3.jpg,a"),
        ("class,split,file", "b,train,b/1.png", "b,val,b/deep/2.png", "a,val,a/3.jpg"),
        ("\ufefffile_name,label", '"b/1.png",b', "", " b/deep/2.png , b", "a/3.jpg,a", "a/3.jpg,a"),
    ],
)
def test_a_csv_names_files_and_classes(folder: Path, lines: tuple[str, ...]) -> None:
    if lines[0].startswith("1.png"):
        with pytest.raises(OdtkError, match=r"labels.csv, line 3: ../a/3.jpg is not in .*images/b; --images names"):
            list_labeled(folder / "b", csv(folder, *lines))
        return
    listing = list_labeled(None, csv(folder, *lines))
    dataset = read_labeled(listing).accepted(False)
    assert labels_of(dataset) == {"3.jpg": "a", "1.png": "b", "2.png": "b"} and listing.classes == ("a", "b")
    assert bool(dataset.warnings()) == (lines[-1] == lines[-2]), "an image that is named twice is said"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ((), "has no lines"),
        (("file,class",), "no line below its first"),
        (("a/3.jpg,a,x",), "a CSV of 3 columns needs a first line that names the columns"),
        (("a/3.jpg,a", "b/1.png,"), "line 2: it needs a file name and a class"),
        (("a/3.jpg,a", "a/3.jpg,b"), "line 2: a/3.jpg is b here and a before"),
        (("a/3.jpg,a", "", "./a/3.jpg,b"), "line 3: a/3.jpg is b here and a before"),
        (("/etc/x.png,a",), "line 1: /etc/x.png is not in"),
        (("a/3.jpg,a", "b\0.png,a"), "line 2: .* is not in"),
        (("img,target", "a/3.jpg,a"), r"1 file not found in .*: img; .* \(file or .* and class or .* names of columns"),
        (("a/4.jpg,a", "b/1.png,b"), "1 file not found in .*: a/4.jpg; mend the names"),
    ],
)
def test_csvs_that_are_refused(folder: Path, lines: tuple[str, ...], sentence: str) -> None:
    path = csv(folder, *lines)
    if not lines:
        path.write_text("")
    with pytest.raises(OdtkError, match=sentence):
        read_labeled(list_labeled(None, path)).accepted(False)


def test_csvs_of_spreadsheets_and_other_systems_are_read(folder: Path) -> None:
    path = folder / "labels.csv"
    rows = [("file", "class"), ("b/1.png", "b"), (str(folder / "b" / "deep" / "2.png"), "b"), ("a\\3.jpg", "a")]
    for mark, encoding, end in (
        (";", "utf-8", "\r\n"),
        ("\t", "utf-16", "\n"),
        (",", "utf-8-sig", "\r"),
        (",", "utf-16-le", "\n"),
    ):
        text = end.join(mark.join(row) for row in rows)
        path.write_bytes(text.encode(encoding))
        if encoding == "utf-16-le":  # without a mark of its order nothing says so
            with pytest.raises(OdtkError, match=r"labels\.csv"):
                list_labeled(folder, path)
            continue
        assert labels_of(read_labeled(list_labeled(None, path))) == {"3.jpg": "a", "1.png": "b", "2.png": "b"}
    path.write_bytes("a/3.jpg,größer".encode("latin-1"))
    with pytest.raises(OdtkError, match="is no text in UTF-8: save it as a CSV in UTF-8"):
        list_labeled(None, path)


def test_messages_name_the_flags_that_were_given(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="none does not exist: give .* with --val-images"):
        list_labeled(tmp_path / "none", None, part="val-")
    with pytest.raises(OdtkError, match="3.jpg is a file: give .* with --images"):
        list_labeled(folder / "a" / "3.jpg", None)
    with pytest.raises(OdtkError, match="Cannot read --val-labels .*none.csv"):
        list_labeled(None, tmp_path / "none.csv", part="val-")


def test_the_folder_above_the_splits_is_not_taken_for_classes(folder: Path) -> None:
    (folder / "a").rename(folder / "Train")
    (folder / "b").rename(folder / "val")
    with pytest.raises(OdtkError, match="holds Train and val, which are no classes: give --images .*Train"):
        list_labeled(folder, None)
    (folder / "val").rename(folder / "bus")
    assert list_labeled(folder, None).classes == ("Train", "bus"), "one class may have such a name"


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="does not exist"):
        list_labeled(tmp_path / "none", None)
    with pytest.raises(OdtkError, match="has no subfolders: give it one per class"):
        list_labeled(folder / "a", None)
    listing = list_labeled(folder, None)
    with pytest.raises(OdtkError, match=r"has classes that are not trained \(a\)"):
        read_labeled(listing, ["b", "c"])
    assert labels_of(read_labeled(listing, ["c", "b", "a"]))["3.jpg"] == "a", "labels are those of the training set"
    (folder / "c").mkdir()
    with pytest.raises(OdtkError, match="/c, a class, has no images"):
        list_labeled(folder, None)


def test_a_damaged_image_is_refused_or_left_out(folder: Path) -> None:
    whole = (folder / "a/3.jpg").read_bytes()
    (folder / "a/3.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OdtkError, match=r"3.jpg \(the file is truncated.*--skip-damaged"):
        read_labeled(list_labeled(folder, None)).accepted(False)
    assert len(read_labeled(list_labeled(folder, None)).accepted(True).images) == 2


def test_an_image_becomes_a_square_of_what_is_seen_of_it(folder: Path) -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :5], pixels[:, -5:] = 255, 255  # white at both ends of the longer side
    Image.fromarray(pixels).save(folder / "b/1.png")
    dataset = read_labeled(list_labeled(folder, None))
    config = LoaderConfig("", square=32, center=1.0, loader="torch", input_type="uint8", batch=3)
    (batch,) = create_loader(dataset, config)
    assert batch.images.shape == (3, 3, 32, 32) and batch.labels.tolist() == [[0], [1], [1]]
    assert batch.images[1].max() == 0, "the center, whose side is the shorter one, without the ends"
    assert batch.boxes.tolist() == [[[0, 0, 31, 31]]] * 3, "one box: the whole square, inclusive corners"
    whole = Sampler(dataset, LoaderConfig("", square=32, training=True, augment=AugmentConfig(area=(1, 1), crop=0)))
    assert {sample.view.crop for n in range(3) for sample in whole.plan(n).samples} == {(0, 0, 40, 30)}


def test_a_random_crop_keeps_to_its_area_and_aspect() -> None:
    generator = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(500):
        x1, y1, x2, y2 = resized_crop(generator, (200, 150), (0.1, 0.5))
        assert 0 <= x1 < x2 <= 200 and 0 <= y1 < y2 <= 150
        areas.append((x2 - x1) * (y2 - y1) / 30000)
        aspects.append((x2 - x1) / (y2 - y1))
    assert 0.095 < min(areas) < 0.12 and 0.47 < max(areas) < 0.51, "the whole range of areas"
    assert 0.74 < min(aspects) < 0.77 and 1.3 < max(aspects) < 1.36
    assert resized_crop(generator, (300, 30), (0.99, 1.0)) == (130, 0, 170, 30), "the center, of aspect 4/3"
    assert resized_crop(generator, (30, 300), (0.99, 1.0)) == (0, 130, 30, 170)
    assert resized_crop(generator, (1, 1), (0.08, 1.0)) == (0, 0, 1, 1)
