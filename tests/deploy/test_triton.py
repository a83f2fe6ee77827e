"""What a bundle has for Triton: configurations that its schema takes, a client that prepares images as odtk does."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import odtk
from odtk.config import ExportConfig, LoaderConfig
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.deploy.bundle import metadata_of
from odtk.deploy.triton import as_text, model_config, outputs_of, write_triton
from odtk.exporting.metadata import Metadata
from odtk.exporting.session import open_session
from odtk.inference.detect import touches_image
from tests.inference.test_served import Server

text_format = pytest.importorskip("google.protobuf.text_format")
schema = pytest.importorskip("tritonclient.grpc").model_config_pb2

CLIENT = Path(odtk.__file__).parent / "deploy" / "triton_client" / "client.py"


@pytest.fixture(scope="module")
def client() -> ModuleType:
    """The client of the bundle, as a module."""
    spec = importlib.util.spec_from_file_location("client", CLIENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_says_what_the_file_is(bundle: Path) -> None:
    model = bundle / "triton" / "onnx" / "detector"
    config: Any = text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())
    session = open_session(str(model / "1" / "model.onnx"))
    assert config.backend == "onnxruntime" and not config.name  # the folder's name is the model's
    types = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for written, own in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(one.name, schema.DataType.Name(one.data_type), list(one.dims)) for one in written] == [
            (one.name, types[one.type], one.shape[1:]) for one in own
        ]
    assert config.max_batch_size == 16 and list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    labels = {output.name: output.label_filename for output in config.output}
    assert labels == {"scores": "", "boxes": "", "classes": "labels.txt"}
    assert (model / "labels.txt").read_bytes() == (bundle / "labels.txt").read_bytes()
    text = config.parameters["odtk"].string_value
    assert Metadata.from_json(text, "") == metadata_of(str(bundle / "model.onnx"))


@pytest.mark.parametrize(
    ("batch", "profiles", "preferred"),
    [((1, 8, 16), ["0", "1"], [8, 16]), ((1, 1, 4), ["0"], [4]), ((1, 1, 1), ["0"], [])],
)
def test_an_engine_is_for_its_gpu_and_has_its_profiles(
    batch: Any, profiles: list, preferred: list, bundle: Path
) -> None:
    metadata = dataclasses.replace(metadata_of(str(bundle / "model.onnx")), batch=batch, postprocessing="plugins")
    outputs = outputs_of("none", metadata, "model.plan")
    config = text_format.Parse(
        as_text(model_config(schema, metadata, "model.plan", outputs, "8.6")), schema.ModelConfig()
    )
    assert config.backend == "tensorrt" and dict(config.cc_model_filenames) == {"8.6": "model.8.6.plan"}
    (group,) = config.instance_group
    assert group.kind == schema.ModelInstanceGroup.KIND_GPU and list(group.profile) == profiles
    assert list(config.dynamic_batching.preferred_batch_size) == preferred and config.max_batch_size == batch[2]
    assert [list(output.dims) for output in config.output] == [[100], [100, 4], [100]]
    assert config.output[2].data_type == schema.TYPE_INT32
    assert not model_config(schema, metadata, "model.plan", outputs, None).cc_model_filenames


def test_an_engine_for_more_images_at_once_than_triton_may_send_is_left_out(
    bundle: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "model.onnx").symlink_to(bundle / "model.onnx")
    metadata = dataclasses.replace(metadata_of(str(bundle / "model.onnx")), batch=(2, 8, 16))
    written = write_triton(ExportConfig("none.pth", str(tmp_path)), metadata, ["model.onnx", "model.plan"], "a\n")
    assert written == ["triton/onnx/detector/1/model.onnx"] and "below the MIN of --batch" in capsys.readouterr().out
    assert "plugins" not in (tmp_path / "triton" / "README.md").read_text()


def test_a_bundle_without_tritonclient_says_what_it_lacks(bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    metadata = metadata_of(str(bundle / "model.onnx"))
    assert write_triton(ExportConfig("none.pth", str(tmp_path)), metadata, ["model.onnx"], "") == []
    assert "pip install 'odtk[triton]'" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
@pytest.mark.parametrize("padding", ["black", "mean"])
def test_the_client_feeds_what_odtk_feeds(
    client: ModuleType, input_type: str, padding: str, bundle: Path, tmp_path: Path
) -> None:
    metadata = dataclasses.replace(
        metadata_of(str(bundle / "model.onnx")), size=(64, 96), padding=padding, input_type=input_type
    )
    for width, height in ((96, 64), (200, 100), (37, 121), (33, 17)):
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{width}.png")
    data = LoaderConfig(
        images=str(tmp_path), batch=1, size=(64, 96), loader="torch", padding=padding, input_type=input_type
    )
    dataset = Dataset.load(None, str(tmp_path))
    for image, batch in zip(dataset.images, create_loader(dataset, data), strict=True):
        pixels, scale = client.prepare(Image.open(image.path), json.loads(metadata.to_json()))
        assert pixels.dtype == input_type
        np.testing.assert_allclose(pixels, batch.images[0].numpy(), atol=0 if input_type == "uint8" else 1e-4)
        np.testing.assert_allclose(scale, batch.scales[0], rtol=1e-6)


@pytest.mark.parametrize("values", [4, 6])
def test_the_client_drops_what_lies_in_the_padding_alone_as_odtk_does(client: ModuleType, values: int) -> None:
    metadata = {"size": [64, 96], "padding": "black", "mean": [0.0] * 3, "input_type": "uint8", "categories": None}
    generator = np.random.default_rng(values)
    start, angle = generator.uniform(-10, 95, (400, 2)), generator.uniform(0, 2 * np.pi, (400, 1))
    boxes = np.hstack([start, start + generator.uniform(0, 40, (400, 2)), np.sin(angle), np.cos(angle)])[:, :values]
    boxes[:, 4:] *= generator.uniform(0.1, 5, (400, 1))  # their length says nothing
    image = Image.new("RGB", (100, 33))  # scaled to 96 × 32 of 96 × 64
    kept = touches_image(torch.from_numpy(boxes)[None], torch.tensor([[96, 32]]))[0].numpy()
    assert 0.1 < kept.mean() < 0.9

    answer = {"scores": np.linspace(1, 0.5, 400), "boxes": boxes, "classes": np.arange(400)}
    detector = object.__new__(client.Detector)
    detector.facts, detector.model = metadata, "detector"
    detector.client = SimpleNamespace(InferInput=lambda *_: SimpleNamespace(set_data_from_numpy=lambda _: None))
    reply = SimpleNamespace(as_numpy=lambda name: answer[name][None])
    detector.server = SimpleNamespace(infer=lambda *_: reply)
    assert [one["name"] for one in detector(image)] == [f"class {index}" for index in np.flatnonzero(kept)]


def test_the_client_turns_boxes_into_those_of_the_image(client: ModuleType) -> None:
    assert client.place([8, 8, 23, 15], (2.0, 0.5))["box"] == [4, 16, 8, 16]
    turned = client.place([8, 8, 23, 15, 1.0, 0.0], (1.0, 1.0))
    assert turned["radians"] == pytest.approx(np.pi / 2, abs=1e-4)
    picture = np.asarray(client.draw(Image.new("RGB", (40, 30)), [{"name": "cell", "score": 0.5, **turned}]))
    assert picture[20, 12].tolist() == [255, 0, 0]  # 16 by 8 around (16, 12), on end: from (12, 4) to (20, 20)


def run_client(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs the client as its users do; whatever happens, it prints no traceback."""
    found = subprocess.run([sys.executable, CLIENT, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in found.stderr
    return found


def test_the_client_goes_on_after_a_photo_that_it_cannot_read(tmp_path: Path) -> None:
    photos = [tmp_path / folder / "a.png" for folder in ("1", "2", "3")]
    for i, photo in enumerate(photos):
        photo.parent.mkdir()
        Image.new("RGB", (32, 32), (100 + 50 * i,) * 3).save(photo)
    photos[1].write_bytes(b"no image")
    server, out = Server(), tmp_path / "out"
    url = server.address.removesuffix("/cells")  # grpc://HOST:PORT
    words = ["--grpc", "--model", "cells", "--output", out]
    found = run_client(tmp_path / "none.png", *photos, "--url", url, *words)
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 2
    assert f"{tmp_path}/none.png cannot be read: No such file" in found.stderr and str(photos[1]) in found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(line["image"], line["score"]) for line in lines] == [(str(photos[0]), 0.3922), (str(photos[2]), 0.7843)]
    assert sorted(path.name for path in out.iterdir()) == ["a-3.png", "a.png"], "that of the damaged one is left out"
    assert run_client(photos[0], "--url", url, "--grpc", "--model", "cells").returncode == 0

    found = run_client(photos[0], "--url", url, "--grpc", "--model", "plates")
    assert found.returncode == 1 and "no model plates: " in found.stderr and "unknown model" in found.stderr
    found = run_client(photos[0], "--url", url.replace("grpc:", "http:"), "--model", "cells")
    assert found.returncode == 1 and "is no Triton server for HTTP, or has no model cells: " in found.stderr
    for more in ([], ["--grpc"]):
        found = run_client(photos[0], "--url", "http://127.0.0.1:1", *more)
        assert found.returncode == 1 and found.stderr.startswith("127.0.0.1:1 is no Triton server for ")
        assert len(found.stderr.splitlines()) == 1
    server.model = None
    assert "is not of a bundle" in run_client(photos[0], "--url", url, "--grpc", "--model", "cells").stderr
    server.server.stop(None)


@pytest.mark.parametrize(("more", "url"), [([], "localhost:8000"), (["--grpc"], "localhost:8001")])
def test_the_client_asks_the_port_of_the_protocol(client: ModuleType, more: list, url: str, monkeypatch) -> None:
    asked: list[str] = []

    def detector(url: str, model: str, grpc: bool) -> None:
        asked.append(url)
        raise SystemExit

    monkeypatch.setattr(client, "Detector", detector)
    monkeypatch.setattr(sys, "argv", ["client.py", "a.png", *more])
    with pytest.raises(SystemExit):
        client.main()
    assert asked == [url]
