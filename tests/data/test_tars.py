"""Images in tar files: the datasets and batches of a folder, from a disk, by HTTP and from S3; lost connections."""

import gzip
import http.server
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odtk.config import AugmentConfig, LoaderConfig, OdtkError
from odtk.data import storage, tars
from odtk.data.dataset import Dataset, read
from odtk.data.loader import create_loader
from odtk.data.storage import find_files, written_out

torch.set_num_threads(1)
SIZES = [(60, 40), (40, 60), (50, 50), (60, 40), (64, 48), (30, 30), (60, 40)]


# ---------------------------------------------------------------------------------------------------------------------
# The data, and servers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    return tmp_path / "cache" / "odtk" / "tars"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """images/, annotations.json, and shards/ of the same images: two tars, with labels beside the images."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i, (width, height) in enumerate(SIZES):
        name = f"{i:03}.{'png' if i == 2 else 'jpg'}"
        pixels = generator.integers(0, 255, (height, width) if i == 3 else (height, width, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 5 else 1
        Image.fromarray(pixels).save(folder / "images" / name, exif=exif)
        images.append({"id": 10 + i, "file_name": name, "width": width, "height": height})
        box = [5, 5, 20, 15]
        annotations.append({"id": i + 1, "image_id": 10 + i, "category_id": 1 + i % 2, "bbox": box})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    names = [str(image["file_name"]) for image in images]
    write_tar(folder / "shards" / "train-000.tar", folder / "images", names[:4])
    write_tar(folder / "shards" / "train-001.tar", folder / "images", names[4:], prefix="./")
    return folder


def write_tar(path: Path, images: Path, names: list[str], prefix: str = "") -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.add(images / name, prefix + name)
            label = b"1"
            info = tarfile.TarInfo(f"{prefix}{Path(name).stem}.cls")
            info.size = len(label)
            tar.addfile(info, io.BytesIO(label))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers ranges; the server's ``failures`` are the answers that come before it does its work."""

    def do_GET(self) -> None:
        if self.server.failures:  # type: ignore[attr-defined]
            failure = self.server.failures.pop(0)  # type: ignore[attr-defined]
            if failure == "cut":
                self.send_response(206)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"only this")
            elif failure:
                self.send_error(failure)
            self.close_connection = True
            return
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not path.is_file() or not self.server.ranges:  # type: ignore[attr-defined]
            return super().do_GET()
        first, last = map(int, asked.groups())
        self.server.asked.append((first, last))  # type: ignore[attr-defined]
        content = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content[first : last + 1])))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(data: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    def handler(*arguments) -> Handler:
        return Handler(*arguments, directory=str(data / "shards"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.failures, running.ranges, running.asked = [], True, []  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def address(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def bucket(data: Path, monkeypatch) -> Iterator[str]:
    """The tars in a bucket of moto's S3 server."""
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage.file_system.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    for path in (data / "shards").iterdir():
        client.upload_file(str(path), "shards", f"set/{path.name}")
    yield "s3://shards/set"
    running.stop()
    storage.file_system.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The same as from a folder


def same_images(found: Dataset, expected: Dataset) -> None:
    assert found.categories == expected.categories and len(found.images) == len(expected.images)
    for a, b in zip(found.images, expected.images, strict=True):
        assert (a.id, a.width, a.height, a.orientation, a.plain) == (b.id, b.width, b.height, b.orientation, b.plain)
        assert a.path.name == b.path.name and (a.boxes == b.boxes).all() and (a.labels == b.labels).all()
        assert a.read() == b.read() and (a.decode() == b.decode()).all()
    assert [(fault.id, fault.rule) for fault in found.faults] == [(fault.id, fault.rule) for fault in expected.faults]


PATTERNS = ["train-{000..001}.tar", "train-00{0,1}.tar", "*.tar"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("annotated", [True, False])
def test_a_disk_gives_the_dataset_of_the_folder(data: Path, pattern: str, annotated: bool) -> None:
    annotations = data / "annotations.json" if annotated else None
    expected = Dataset.load(annotations, data / "images")
    for _ in range(2):  # the second time from the cache
        same_images(Dataset.load(annotations, f"{data}/shards/{pattern}"), expected)


def test_http_gives_the_dataset_of_the_folder(data: Path, server) -> None:
    expected = Dataset.load(data / "annotations.json", data / "images")
    same_images(Dataset.load(data / "annotations.json", f"{address(server)}/{PATTERNS[0]}"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_s3_gives_the_dataset_of_the_folder(data: Path, bucket: str, pattern: str) -> None:
    expected = Dataset.load(data / "annotations.json", data / "images")
    same_images(Dataset.load(data / "annotations.json", f"{bucket}/{pattern}"), expected)
    with pytest.raises(OdtkError, match="s3://shards/set/none.tar: there is no such file"):
        Dataset.load(data / "annotations.json", f"{bucket}/none.tar")


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("training", [True, False])
def test_batches_are_those_of_the_folder(data: Path, server, engine: str, training: bool) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    config = LoaderConfig(
        "",
        loader=engine,
        batch=3,
        resize=48,
        max_size=96,
        jitter=(40, 56),
        training=training,
        augment=AugmentConfig(brightness=0.1, rotate=True),
    )
    annotations = str(data / "annotations.json")
    sources = (str(data / "images"), f"{data}/shards/*.tar", f"{address(server)}/train-{{000..001}}.tar")
    loaders = [create_loader(Dataset.load(annotations, source), config) for source in sources]
    count = 5 if training else len(loaders[0])
    for _, expected, *others in zip(range(count), *loaders, strict=False):
        for found in others:
            assert torch.equal(found.images, expected.images) and torch.equal(found.boxes, expected.boxes)
            assert torch.equal(found.labels, expected.labels) and torch.equal(found.ids, expected.ids)
            assert found.damaged is not None and not found.damaged.any()
    assert (loaders[1].batch(2).images == loaders[0].batch(2).images).all()


def test_the_second_start_reads_no_tar(data: Path, server, cache: Path) -> None:
    source = f"{address(server)}/train-{{000..001}}.tar"
    first = Dataset.load(None, source)
    assert server.asked and len(list(cache.iterdir())) == 2
    server.asked.clear()
    second = Dataset.load(None, source)
    assert not server.asked
    same_images(second, first)
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1])  # damaged: read again
    server.asked.clear()
    assert len(Dataset.load(None, source).images) == len(SIZES) and server.asked


def test_a_tar_that_was_written_again_is_read_again(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, data / "images", ["000.jpg", "001.jpg"])
    assert [image.path.name for image in Dataset.load(None, str(path)).images] == ["000.jpg", "001.jpg"]
    write_tar(path, data / "images", ["000.jpg", "002.png"])
    assert [image.path.name for image in Dataset.load(None, path).images] == ["000.jpg", "002.png"]


def test_names_in_annotations_may_have_folders(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "annotations.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"train2017/{image['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert len(Dataset.load(tmp_path / "a.json", f"{data}/shards/*.tar").images) == len(SIZES)


def test_damage_in_a_tar_is_found_as_in_a_folder(data: Path, tmp_path: Path) -> None:
    """Cut off before it was put into the tar; a header of another kind; missing."""
    (tmp_path / "images").mkdir()
    for path in (data / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "001.jpg").write_bytes((data / "images" / "001.jpg").read_bytes()[:-50])
    (tmp_path / "images" / "004.jpg").write_bytes(b"text")
    write_tar(tmp_path / "a.tar", tmp_path / "images", [f"00{i}.jpg" for i in (0, 1, 3, 4, 5)] + ["002.png"])
    found = read(data / "annotations.json", str(tmp_path / "a.tar"))
    refused = {fault.id: fault.reason for fault in found.faults if not fault.fixed}
    assert set(refused) == {"image 11", "image 14", "image 16"}
    assert "truncated" in refused["image 11"] and "not an image" in refused["image 14"]
    assert refused["image 16"] == f"there is no such image in {tmp_path / 'a.tar'}"


def test_hard_links_are_images(data: Path, tmp_path: Path) -> None:
    """As tar writes the same file twice; what macOS adds is none, and a link to nothing is refused."""
    content = (data / "images" / "000.jpg").read_bytes()
    members = (("./a.jpg", ""), ("./._a.jpg", ""), ("./b.jpg", "./a.jpg"), ("./c/d.jpg", "b.jpg"), ("a.cls", "no.cls"))
    for more in ((), (("e.jpg", "no.jpg"),)):
        path = tmp_path / f"{len(more)}.tar"
        with tarfile.open(path, "w") as tar:
            for name, target in (*members, *more):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = (tarfile.LNKTYPE, target) if target else (tarfile.REGTYPE, "")
                info.size = 0 if target else len(content)
                tar.addfile(info, io.BytesIO(content))
    images = Dataset.load(None, str(tmp_path / "0.tar")).images
    assert [image.path.relative_to(tmp_path / "0.tar").as_posix() for image in images] == ["a.jpg", "b.jpg", "c/d.jpg"]
    assert all(image.read() == content for image in images)
    with pytest.raises(OdtkError, match=r"1.tar holds e.jpg as a hard link to no.jpg, which is no image before it"):
        Dataset.load(None, str(tmp_path / "1.tar"))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_symbolic_links_are_named(data: Path, tmp_path: Path) -> None:
    """Those that would be images: they were passed over, and the images seemed to be missing."""
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for name, target in (("README", "../README.md"), ("a.jpg", "/data/a.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    with pytest.raises(OdtkError, match=r"links.tar holds a.jpg as a symbolic link to /data/a.jpg: write the image"):
        Dataset.load(None, str(path))


def test_what_is_no_whole_tar_is_refused(data: Path, tmp_path: Path) -> None:
    whole = (data / "shards" / "train-000.tar").read_bytes()
    with tarfile.open(data / "shards" / "train-000.tar") as tar:
        second = tar.getmembers()[1].offset
    refused = {
        "empty": (b"", "is not a whole, uncompressed tar"),
        "text": (b"no tar " * 1000, "is not a whole, uncompressed tar"),
        "zipped": (gzip.compress(whole), "is not a whole, uncompressed tar"),
        "cut": (whole[: second + 700], "whole"),
        "header": (whole[:second] + b"\xff" * 512 + whole[second + 512 :], "after 000.jpg it does not go on"),
        "ended": (whole[:second], "after 000.jpg it does not go on"),
    }
    for name, (content, words) in refused.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        with pytest.raises(OdtkError, match=f"{name}.tar .*{words}"):
            Dataset.load(None, str(path))


def test_sources_that_make_no_sense_are_refused(data: Path, tmp_path: Path) -> None:
    shards = data / "shards"
    write_tar(tmp_path / "again.tar", data / "images", ["000.jpg"])
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    for images, words in (
        (f"{shards}/no-*.tar", "No tar file matches"),
        (f"{shards}/no.tar", "Cannot read .*no.tar: No such file"),
        ("s3://bucket/folder", "is not the address of a .tar"),
        ("none://bucket/a.tar", "none:// cannot be read"),
        ("ftp://localhost/a.tar", "^ftp:// cannot be read: tar files are read from http, https, s3 and file.$"),
        (f"zip://{shards}/a.tar", "^zip:// cannot be read: tar files are read from"),
        (f"simplecache::file://{shards}/a.tar", "^simplecache::file:// cannot be read"),
        ([f"{shards}/*.tar", str(data / "images")], "not both at once"),
        ([f"{shards}/*.tar", str(tmp_path / "again.tar")], "000.jpg is in .*train-000.tar and again in .*again.tar"),
        (str(tmp_path / "none.tar"), "There are no images"),
    ):
        with pytest.raises(OdtkError, match=words):
            Dataset.load(None, images)
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    with pytest.raises(OdtkError, match="images in tar files need COCO JSON"):
        Dataset.load(tmp_path / "data.yaml", f"{shards}/*.tar")


def test_braces_are_written_out() -> None:
    assert written_out("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert written_out("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert written_out("a{b}c") == ["a{b}c"]


# ---------------------------------------------------------------------------------------------------------------------
# Connections that are lost


def test_a_lost_connection_comes_back(data: Path, server, capsys) -> None:
    """Answers of 503, cut ones and closed connections, of which each is one try."""
    expected = Dataset.load(None, data / "images")
    found = Dataset.load(None, f"{address(server)}/train-{{000..001}}.tar")
    server.failures[:] = [503, "cut", None, 429, "cut"]
    assert found.images[2].read() == expected.images[2].read()
    assert not server.failures and "more tries" in capsys.readouterr().err


def test_a_connection_that_does_not_come_back_is_named(data: Path, server) -> None:
    source = f"{address(server)}/train-{{000..001}}.tar"
    dataset = Dataset.load(data / "annotations.json", source)
    server.failures[:] = [403]
    with pytest.raises(OdtkError, match=r"Cannot read http://.*: HTTP 403"):
        dataset.images[0].decode()
    assert not server.failures  # not tried again

    loader = create_loader(dataset, LoaderConfig("", loader="torch", batch=2, resize=48))
    server.failures[:] = [503] * 1000
    with pytest.raises(
        OdtkError, match=rf"The connection to {address(server)}/train-00\d.tar was lost \(HTTP 503\) and did"
    ):
        list(loader)
    assert not loader.damaged  # an image that cannot be had is not a damaged one


def test_a_server_that_is_gone(data: Path, server) -> None:
    dataset = Dataset.load(None, f"{address(server)}/train-000.tar")
    server.shutdown()
    server.server_close()
    with pytest.raises(OdtkError, match="was lost .* did not come back in 6 tries"):
        dataset.images[0].read()
    with pytest.raises(OdtkError, match="did not come back in 6 tries"):
        find_files(f"{address(server)}/train-000.tar")


def test_a_server_without_ranges_is_refused(data: Path, server, monkeypatch) -> None:
    server.ranges = False
    monkeypatch.setattr(storage, "BLOCK", 4096)  # else the first range of so small a file is all of it
    with pytest.raises(OdtkError, match="does not answer ranges"):
        Dataset.load(None, f"{address(server)}/train-000.tar")


def test_a_tar_that_shrinks_during_a_run_is_named(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, data / "images", ["000.jpg", "001.jpg"])
    dataset = Dataset.load(None, str(path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OdtkError, match="Cannot read .*a.tar: fewer bytes came"):
        dataset.images[1].read()


def test_a_remote_file_that_is_looked_through_reads_little_of_what_is_skipped(
    tmp_path: Path, server, data: Path
) -> None:
    """Headers and ends of large images, not what is between; all of small ones, in ever larger parts."""
    with tarfile.open(data / "shards" / "large.tar", "w") as tar:
        for i in range(4):
            stored = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 255, (500, 700, 3), dtype=np.uint8)
            Image.fromarray(noise).save(stored, "JPEG", quality=95)
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = stored.tell()
            stored.seek(0)
            tar.addfile(info, stored)
    size = (data / "shards" / "large.tar").stat().st_size
    assert len(Dataset.load(None, f"{address(server)}/large.tar").images) == 4
    read = sum(last + 1 - first for first, last in server.asked)
    assert size > 1_000_000 and read < size / 2
    assert tars.index_of(find_files(f"{address(server)}/large.tar")[0])[3][0] == "3.jpg"
    (data / "shards" / "large.tar").unlink()
