"""Detections on disk: what is written is what is read, in order, with few rows in memory; runs that go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import odtk
from odtk.categories import Category
from odtk.config import InferConfig, LoaderConfig, ModelConfig, OdtkError, PostprocessConfig, TilesConfig
from odtk.data import records
from odtk.data.storage import RangedFile
from odtk.data.tars import Member
from odtk.evaluation.evaluate import read_detections, run_cocoeval
from odtk.inference import infer, resume, shards
from odtk.inference.collect import Memory, Part
from odtk.inference.detect import coco_results, joined
from odtk.launch import launch
from odtk.ranks import CpuGroup
from tests.random_models import detector_of, save

torch.set_num_threads(1)
CATEGORIES = (Category(2**40, "cat"), Category(-3, "dög"))
SMALL = ModelConfig(
    backbones=("ResNet18FPN",),
    classes=2,
    head="dense",
    last_level=5,
    pyramid_channels=32,
    head_channels=32,
    head_convs=1,
)
PROGRAM = """
import sys
from odtk.cli import main
from odtk.inference import shards
shards.SHARD_ROWS = 0  # a shard for each batch
if __name__ == "__main__":
    sys.exit(main())
"""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def made_up(ids: list[int], width: int, seed: int = 0, most: int = 6) -> list[Part]:
    """One part for each pair of images, with up to ``most`` detections in each; many scores are equal."""
    generator = np.random.default_rng(seed)
    parts = []
    for i in range(0, len(ids), 2):
        own = ids[i : i + 2]
        counts = generator.integers(0, most + 1, len(own))
        n = int(counts.sum())
        rows = np.concatenate(
            [generator.integers(0, 2, (n, 1)), generator.integers(1, 9, (n, 1)) / 9, generator.normal(size=(n, width))],
            axis=1,
        )
        parts.append(Part(own, (np.repeat(np.array(own, dtype=np.int64), counts), rows), [own[0]] if i == 4 else []))
    return parts


@pytest.mark.parametrize("width", [4, 5])
def test_shards_of_two_ranks_give_what_memory_gives(tmp_path: Path, monkeypatch, width: int) -> None:
    """Images in no order, ids beyond 2⁵³, equal scores: the same bytes of JSON as from memory, in several windows."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 40)
    monkeypatch.setattr(shards, "GROUP_ROWS", 7)
    monkeypatch.setattr(shards, "WINDOW_ROWS", 30)
    ids = [2**60 + 1, 2**60, *random.Random(0).sample(range(-500, 500), 298)]
    memory = Memory(len(ids), None)
    paths = []
    for rank in range(2):
        writer = shards.ShardWriter(tmp_path, rank, 0, CATEGORIES, width)
        for part in made_up(ids[rank::2], width, seed=rank):
            writer.add(part)
            memory.add(part)
        writer.flush()
        assert writer.written == shards.shards_of(tmp_path, rank)
        assert sum(shard.images for shard in writer.written) == 150
        assert [id for shard in writer.written for id in shard.damaged] == [ids[rank::2][4]]
        paths += [shard.path for shard in writer.written]
    total = memory.finish()
    assert total is not None and total.detections > 500
    windows = list(shards.merged(paths))
    assert len(windows) > 3
    for name, found in (("a.json", memory.windows()), ("b.json", iter(windows)), ("c.parquet", iter(windows))):
        infer.write_results(found, CATEGORIES, str(tmp_path / name), width)
    (expected,) = memory.all
    everything = coco_results(*expected, CATEGORIES)
    assert (tmp_path / "a.json").read_text() == json.dumps(everything) == (tmp_path / "b.json").read_text()
    assert read_detections(str(tmp_path / "c.parquet")) == everything == read_detections(str(tmp_path))


def test_few_rows_are_held_where_images_come_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 500)
    monkeypatch.setattr(shards, "GROUP_ROWS", 20)
    monkeypatch.setattr(shards, "WINDOW_ROWS", 100)
    paths = []
    for rank in range(2):
        writer = shards.ShardWriter(tmp_path, rank, 0, CATEGORIES, 4)
        for part in made_up(list(range(rank, 2000, 2)), 4, seed=rank):
            writer.add(part)
        writer.flush()
        paths += [shard.path for shard in writer.written]
    windows = list(shards.merged(paths))
    assert max(len(ids) for ids, _ in windows) < 400 and sum(len(ids) for ids, _ in windows) > 5000
    assert (np.diff(joined(windows)[0]) >= 0).all()


def test_no_detections_at_all(tmp_path: Path) -> None:
    writer = shards.ShardWriter(tmp_path, 0, 0, CATEGORIES, 4)
    writer.add(Part([1], (np.zeros(0, np.int64), np.zeros((0, 6)))))
    writer.flush()
    assert list(shards.merged([writer.written[0].path])) == []
    for name in ("o.json", "o.parquet"):
        infer.write_results(iter([]), CATEGORIES, str(tmp_path / name), 4)
        assert read_detections(str(tmp_path / name)) == []


def test_a_gap_or_a_damaged_shard_ends_what_is_done(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 1)
    writer = shards.ShardWriter(tmp_path, 3, 0, CATEGORIES, 4)
    for part in made_up(list(range(8)), 4, most=9):
        writer.add(part)
    assert len(writer.written) == 4
    writer.written[2].path.write_bytes(writer.written[2].path.read_bytes()[:-9])
    assert shards.shards_of(tmp_path, 3) == writer.written[:2]
    writer.written[1].path.unlink()
    assert shards.shards_of(tmp_path, 3) == writer.written[:1] and shards.shards_of(tmp_path, 0) == []


def one_shard(folder: Path) -> shards.Shard:
    writer = shards.ShardWriter(folder, 0, 0, CATEGORIES, 4)
    for part in made_up(list(range(12)), 4):
        writer.add(part)
    writer.flush()
    return writer.written[0]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def test_no_flipped_bit_of_a_shard_goes_unseen(tmp_path: Path) -> None:
    path = one_shard(tmp_path).path
    content = path.read_bytes()
    assert len(shards.shards_of(tmp_path, 0)) == 1
    for place in range(0, len(content), 7):
        path.write_bytes(flipped(content, place))
        assert shards.shards_of(tmp_path, 0) == []
    path.write_bytes(content)
    (data,) = (shards.open_parquet(path).metadata.row_group(0).column(i) for i in [3])  # scores
    path.write_bytes(flipped(content, data.data_page_offset + data.total_compressed_size - 3))
    with pytest.raises(OdtkError, match=rf"{path.name} is damaged \(.*\): run `odtk infer` again"):
        list(shards.merged([path]))


def test_a_shard_of_before_has_no_hash_and_is_read(tmp_path: Path, monkeypatch) -> None:
    """Nor have its pages checksums; what cannot be decompressed ends what is done."""
    writer_of = shards.parquet().ParquetWriter
    plain = lambda *args, write_page_checksum, **kwargs: writer_of(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(shards.parquet(), "ParquetWriter", plain)
    shard = one_shard(tmp_path)
    expected = read_detections(str(tmp_path))
    old = shard.path.rename(tmp_path / "00000-000000000-000000006.parquet")
    assert read_detections(str(tmp_path)) == expected and len(expected) > 12
    old.write_bytes(flipped(old.read_bytes(), 4))  # the head of the first page
    assert shards.shards_of(tmp_path, 0) == []


def test_what_is_not_done_is_said_to_count_as_without_detections(tmp_path: Path, capsys) -> None:
    shard = one_shard(tmp_path)  # of 12 images
    box = {"id": 1, "image_id": 1, "category_id": -3, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    for count in (12, 15):
        truth = {
            "images": [{"id": i, "width": 64, "height": 64, "file_name": f"{i}.png"} for i in range(count)],
            "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
            "annotations": [box],
        }
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        for found in (tmp_path, shard.path):
            run_cocoeval(str(found), str(tmp_path / "truth.json"))
            said = f"12 of {count} images are done; the others count as without detections.\n"
            assert capsys.readouterr().out == (said if count > 12 else "")
    infer.write_results(shards.merged([shard.path]), CATEGORIES, str(tmp_path / "whole.parquet"), 4)
    run_cocoeval(str(tmp_path / "whole.parquet"), str(tmp_path / "truth.json"))
    assert capsys.readouterr().out == ""


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="holds no detections"):
        read_detections(str(tmp_path))
    (tmp_path / "a.parquet").write_text("nonsense")
    with pytest.raises(OdtkError, match="a.parquet does not hold detections of `odtk infer`"):
        read_detections(str(tmp_path / "a.parquet"))
    import pyarrow as pa

    shards.parquet().write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(OdtkError, match="b.parquet does not hold detections of `odtk infer`"):
        read_detections(str(tmp_path / "b.parquet"))


def test_without_pyarrow_a_run_stays_in_memory_and_says_so(model, images, tmp_path, monkeypatch, capsys) -> None:
    expected = infer.infer(config(model, images, tmp_path / "a.json"))
    monkeypatch.setattr(resume, "MANY", 3)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert infer.infer(config(model, images, tmp_path / "b.json")) == expected
    assert "pip install 'odtk[scale]'" in capsys.readouterr().out
    with pytest.raises(OdtkError, match="pip install 'odtk\\[scale\\]'"):
        infer.infer(config(model, images, tmp_path / "b.parquet"))


# ---------------------------------------------------------------------------------------------------------------------
# Runs that go on


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save(detector_of(SMALL), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven images of two sizes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for i in range(7):
        pixels = generator.integers(0, 255, (40, 64, 3) if i % 3 else (64, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def config(model: str, images: Path, output: Path, *, more: tuple[str, ...] = (), **changes) -> InferConfig:
    own = {name: changes.pop(name) for name in ("tiles", "override", "precision") if name in changes}
    data = LoaderConfig(str(images), **{"loader": "torch", "resize": 64, "batch": 2, **changes})
    return InferConfig(
        model,
        data,
        resize=data.resize,
        max_size=96,
        output=(str(output), *more),
        postprocess=PostprocessConfig(score_threshold=0.01, detections=5, top_n=50),
        **own,
    )


class Killed(BaseException):
    pass


def stop_after(monkeypatch, count: int) -> None:
    """Lets each run end after so many parts, each of which is a shard of its own."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 0)
    add = shards.ShardWriter.add

    def counted(writer: shards.ShardWriter, part: Part) -> None:
        if len(writer.written) == count:
            raise Killed
        add(writer, part)

    monkeypatch.setattr(shards.ShardWriter, "add", counted)


@pytest.mark.parametrize("tiles", [None, TilesConfig((32, 32))])
def test_a_killed_run_goes_on_where_it_stopped(model, images, tmp_path, monkeypatch, capsys, tiles) -> None:
    expected = infer.infer(config(model, images, tmp_path / "whole.json", tiles=tiles))
    assert len({found["image_id"] for found in expected}) == 7
    output = tmp_path / "out.json"
    again = config(model, images, output, more=(str(tmp_path / "out.parquet"),), tiles=tiles)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        for done in (1, 2):  # each run does one part more
            with pytest.raises(Killed):
                infer.infer(again)
            assert not output.exists()
            assert len(read_detections(f"{output}.parts")) == sum(
                found["image_id"] <= done * (1 if tiles else 2) for found in expected
            )
    capsys.readouterr()
    added: list[int] = []
    add = shards.ShardWriter.add

    def noted(writer: shards.ShardWriter, part: Part) -> None:
        added.extend(part.ids)
        add(writer, part)

    monkeypatch.setattr(shards.ShardWriter, "add", noted)
    assert infer.infer(again) == expected
    assert added == ([3, 4, 5, 6, 7] if tiles else [5, 6, 7])
    shown = capsys.readouterr().out
    assert f"Going on with {output}.parts: {2 if tiles else 4} of 7 images are done." in shown and "7/7 images" in shown
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert read_detections(str(tmp_path / "out.parquet")) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.parquet", "whole.json"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch": 3}, "--batch 2 and not 3"),
        ({"resize": 32}, "--resize 64 and not 32"),
        ({"tiles": TilesConfig((32, 32))}, "--tiles none and not 32 32, --overlap none and not 0.2"),
        ({"images": "fewer"}, "other images"),
        ({"model": "another"}, "another model"),
    ],
)
def test_another_run_is_refused_with_the_difference(model, images, tmp_path, monkeypatch, changes, words) -> None:
    output = tmp_path / "out.json"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 1)
        infer.infer(config(model, images, output))
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "out.json.parts").glob("*.parquet"))
    changed = dict(changes)
    if changed.pop("images", None):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "0.png").write_bytes((images / "0.png").read_bytes())
        images = tmp_path / "images"
    if changed.pop("model", None):
        model = save(detector_of(SMALL, bias=-0.9), tmp_path)
    with pytest.raises(OdtkError) as caught:
        infer.infer(config(model, images, output, **changed))
    assert f"out.json.parts holds the detections of a run that did not end, with {words}: start" in str(caught.value)
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "out.json.parts").glob("*.parquet")) == before
    expected = infer.infer(config(model, images, tmp_path / "other.json", **changed))
    assert infer.infer(config(model, images, output, override=True, **changed)) == expected
    assert not (tmp_path / "out.json.parts").exists()


def test_other_images_of_the_same_names_are_refused(model, images, tmp_path, monkeypatch) -> None:
    """A folder that was moved with the times of its files holds the same."""
    own = Path(shutil.copytree(images, tmp_path / "images"))
    output = tmp_path / "out.json"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 1)
        infer.infer(config(model, own, output))
    good = Path(shutil.copytree(own, tmp_path / "good"))  # as cp -p
    pixels = np.array(Image.open(own / "6.png"))
    Image.fromarray(255 - pixels).save(own / "6.png")
    with pytest.raises(OdtkError, match="did not end, with other images: start"):
        infer.infer(config(model, own, output))
    (good / "3.png").rename(good / "2b.png")
    with pytest.raises(OdtkError, match="did not end, with other images: start"):
        infer.infer(config(model, good, output))
    (good / "2b.png").rename(good / "3.png")
    assert infer.infer(config(model, good, output)) == infer.infer(config(model, images, tmp_path / "whole.json"))


def test_which_members_of_tar_files_are_the_same_images() -> None:
    def digest(url: str, version: str, offset: int) -> str:
        member = Member(RangedFile(url, 9000, version), "a/1.png", offset, 70)
        boxes, labels = np.zeros((0, 4)), np.zeros(0, dtype=np.int64)
        return resume.digest_of([records.Image(1, member.path, 8, 8, boxes, labels, member=member)], ())

    first = digest("s3://bucket/x.tar", "v1", 512)
    others = [("s3://other/x.tar", "v1", 512), ("s3://bucket/x.tar", "v2", 512), ("s3://bucket/x.tar", "v1", 1024)]
    assert first not in [digest(*other) for other in others]
    assert digest("https://host/x.tar?key=1", "v1", 512) == digest("https://host/x.tar?key=2", "v1", 512)
    assert digest("/data/x.tar", "1", 512) == digest("/moved/x.tar", "1", 512) != digest("/data/x.tar", "2", 512)


def test_the_part_of_a_damaged_shard_is_done_again(model, images, tmp_path, monkeypatch) -> None:
    expected = infer.infer(config(model, images, tmp_path / "whole.json"))
    for which, place in ((0, 0.1), (0, 0.3), (1, 0.2), (1, 0.7)):
        output = tmp_path / "out.json"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, 2)
            infer.infer(config(model, images, output))
        path = sorted((tmp_path / "out.json.parts").glob("*.parquet"))[which]
        content = path.read_bytes()
        path.write_bytes(flipped(content, int(len(content) * place)))
        assert infer.infer(config(model, images, output)) == expected
        assert not (tmp_path / "out.json.parts").exists()


def test_parts_lie_beside_the_file_that_a_link_leads_to(model, images, tmp_path, monkeypatch) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.json"
    link.symlink_to("disk/found.json")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 1)
        infer.infer(config(model, images, link))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["found.json.parts"]
    assert [path.name for path in tmp_path.glob("out*")] == ["out.json"]
    infer.infer(config(model, images, link))
    assert link.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["found.json"]


def test_what_a_stream_gets_stays_in_memory(model, images, tmp_path) -> None:
    """Also where it leads to a file (`--output /dev/stdout > found.json`)."""

    def collector(output: str) -> object:
        asked = config(model, images, Path(output))
        group = CpuGroup(1)
        with resume.open_collector(asked, lambda _: {}, CATEGORIES, width=4, total=7, ranks=group, log=print) as opened:
            return opened

    with open(tmp_path / "found.json", "wb") as file:
        assert isinstance(collector(f"/dev/fd/{file.fileno()}"), Memory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json"]
    assert isinstance(collector(str(tmp_path / "found.json")), resume.Shards)


def test_a_folder_that_is_not_ours_is_left_alone(model, images, tmp_path) -> None:
    folder = tmp_path / "out.json.parts"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OdtkError, match="out.json.parts is not of `odtk infer`: move it"):
        infer.infer(config(model, images, tmp_path / "out.json", override=True))
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_strict_looks_at_a_damaged_image_again(model, images, tmp_path) -> None:
    """It may have been mended since; without --strict the run ends with what is there."""
    (tmp_path / "images").mkdir()
    for path in images.iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "images" / "2.png"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:2000] + bytes(60) + good[2060:])
    asked = config(model, tmp_path / "images", tmp_path / "out.json")
    with pytest.raises(OdtkError, match=r"2.png is damaged \(1 such image\): mend it, or omit --strict"):
        infer.infer(asked)
    damaged.write_bytes(good)
    assert {found["image_id"] for found in infer.infer(asked)} == {1, 2, 3, 4, 5, 6, 7}


def test_the_command_line_needs_no_list_of_detections(model, images, tmp_path, monkeypatch) -> None:
    """What is returned is all in memory: `odtk infer` asks for it only to score or draw; Python gets it."""
    from odtk import cli

    argv = ["infer", model, "--images", str(images), "--resize", "64", "--devices", "cpu", "--loader", "torch"]
    assert len(odtk.infer(model, images=str(images), resize=64, devices="cpu", output=str(tmp_path / "a.json")) or [])
    monkeypatch.setattr(infer, "coco_results", counting := Counting(coco_results))
    assert cli.main([*argv, "--output", str(tmp_path / "b.json")]) == 0
    assert counting.calls == 1  # to write it


class Counting:
    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def apart(config: InferConfig, rank: int, world: int) -> None:
    """A job of two ranks, of which one does not see the folder of the other."""
    if rank:
        resume.is_seen = lambda folder, token: False
    infer.infer(config, rank, world)


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder(model, images, tmp_path, capfd) -> None:
    expected = infer.infer(config(model, images, tmp_path / "a.json", size=(64, 64)))
    launch(apart, config(model, images, tmp_path / "b.json", size=(64, 64)), devices="cpu:2")
    assert "do not share the folder" in capfd.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert [one["image_id"] for one in found] == [one["image_id"] for one in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.slow
def test_two_processes_killed_at_any_moment_lose_and_double_nothing(model, images, tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    argv = [
        sys.executable,
        str(program),
        "infer",
        model,
        "--images",
        str(images),
        "--resize",
        "64",
        "--loader",
        "torch",
    ]
    argv += ["--devices", "cpu:2", "--batch", "2", "--score-threshold", "0.01"]

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen([*argv, "--output", str(tmp_path / name)], start_new_session=True)

    assert start("whole.json").wait() == 0
    moments = random.Random(3)
    for seen in (1, 3):  # shards: the second run has done more than the first when it is killed
        run = start("out.json")
        while run.poll() is None and len(list((tmp_path / "out.json.parts").glob("*.parquet"))) < seen:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert start("out.json").wait() == 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "out.json.parts").exists()
