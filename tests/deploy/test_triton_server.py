"""A real Triton server on a bundle's model repository: the same detections, whatever happens to it.

The server (triton_server.py) has only the Python backend, which runs the bundle's ONNX file here. So this proves that
Triton takes the configuration, the inputs and outputs and the clients; the backends for ONNX Runtime and TensorRT it
does not prove.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import odtk
from odtk.cli import main
from odtk.inference.predict import Detections
from tests.deploy.triton_server import TritonServer, serve

pytestmark = pytest.mark.slow
CLIENTS = 32


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(bundle / "triton" / "onnx", tmp_path_factory.mktemp("triton")) as running:
        yield running


def addresses(server: TritonServer) -> list[str]:
    return [f"http://{server.http}/detector", f"grpc://{server.grpc}/detector"]


def photos(count: int) -> list[np.ndarray]:
    """Images that differ, uint8 [48, 64, 3]."""
    return list(np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8))


def assert_same(found: Detections, expected: Detections) -> None:
    """Bit for bit but for what a batch of another size changes in the last bits of a convolution."""
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-4, atol=1e-3)


def test_detections_through_the_server_are_those_of_the_file(
    server: TritonServer, bundle: Path, coco: Path, tmp_path: Path
) -> None:
    truth = json.loads((coco / "truth.json").read_text())
    truth["categories"] = [{"id": 3, "name": "red; round cell"}, {"id": 8, "name": "two\nlines"}]
    (coco / "truth.json").write_text(json.dumps(truth))

    def infer(model: str, output: Path) -> float:
        data = ["--images", str(coco), "--annotations", str(coco / "truth.json"), "--devices", "cpu"]
        assert main(["infer", model, *data, "--output", str(output), "--draw", str(tmp_path / "drawn")]) == 0
        return odtk.evaluate(output, annotations=coco / "truth.json").ap

    file = tmp_path / "file.json"
    ap, expected = infer(str(bundle / "model.onnx"), file), json.loads(file.read_text())
    assert len(expected) > 5
    for address in addresses(server):
        assert infer(address, tmp_path / "served.json") == ap
        assert json.loads((tmp_path / "served.json").read_text()) == expected
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_the_client_without_odtk_finds_the_same(server: TritonServer, bundle: Path, coco: Path, tmp_path: Path) -> None:
    expected = odtk.load(bundle / "model.onnx", device="cpu").predict(coco / "1.jpg")
    client = [sys.executable, str(bundle / "triton" / "client.py"), str(coco / "1.jpg"), "--threshold", "0"]
    for words in (["--url", server.http], ["--url", server.grpc, "--grpc"]):
        out = subprocess.run([*client, *words, "--output", str(tmp_path)], check=True, capture_output=True, text=True)
        found = [json.loads(line) for line in out.stdout.splitlines()]
        assert [one["name"] for one in found] == expected.names
        np.testing.assert_allclose([one["score"] for one in found], expected.scores, atol=1e-4)
        np.testing.assert_allclose([one["box"] for one in found], expected.rows[:, 2:], atol=0.01)
    assert (np.asarray(Image.open(tmp_path / "1.png")) == [255, 0, 0]).all(2).any()


def test_many_clients_get_their_own_answers_from_batches_of_several(server: TritonServer, bundle: Path) -> None:
    images = photos(CLIENTS)
    local = odtk.load(bundle / "model.onnx", device="cpu")
    expected = [local.predict(image) for image in images]
    before = len(server.batches.read_text().splitlines()) if server.batches.exists() else 0
    answers: dict[int, list[Detections]] = {}
    start = threading.Barrier(CLIENTS)

    def ask(number: int) -> None:
        model = odtk.load(addresses(server)[number % 2])
        start.wait(60)
        answers[number] = [model.predict(images[number]) for _ in range(5)]

    run([threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)])
    assert len(answers) == CLIENTS
    for number, found in answers.items():
        for one in found:
            assert_same(one, expected[number])
    sizes = [sum(ast.literal_eval(line)) for line in server.batches.read_text().splitlines()[before:]]
    assert sum(sizes) == 5 * CLIENTS and 1 < max(sizes) <= 16


def run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)


def test_requests_that_are_wrong_are_refused_and_harm_nobody(server: TritonServer, bundle: Path) -> None:
    image = photos(1)[0]
    expected = odtk.load(bundle / "model.onnx", device="cpu").predict(image)
    model = odtk.load(addresses(server)[0])

    def body(shape: list[int], kind: str, data: list) -> bytes:
        return json.dumps({"inputs": [{"name": "images", "shape": shape, "datatype": kind, "data": data}]}).encode()

    right = [1, 3, 64, 64]
    for wrong in (
        b"{",
        b"",
        body([1, 3, 64], "UINT8", [0] * 12288),
        body([1, 3, 65, 64], "UINT8", [0] * 12480),
        body([17, 3, 64, 64], "UINT8", [0] * 17 * 12288),
        body(right, "FP32", [0.0] * 12288),
        body(right, "UINT8", [0] * 5),
        body(right, "UINT8", [300] * 12288),
        body(right, "UINT8", ["a"] * 12288),
        body([-1, 3, 64, 64], "UINT8", []),
    ):
        request = urllib.request.Request(f"http://{server.http}/v2/models/detector/infer", data=wrong)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert wrong == body(right, "UINT8", [300] * 12288), answer.read()[:200]  # Triton keeps 8 of its bits
        except urllib.error.HTTPError as error:
            assert 400 <= error.code < 600 and json.loads(error.read())["error"]
        assert_same(model.predict(image), expected)


def test_a_server_that_is_killed_and_started_again_loses_nothing(server: TritonServer, bundle: Path) -> None:
    images = photos(8)
    local = odtk.load(bundle / "model.onnx", device="cpu")
    expected = [local.predict(image) for image in images]
    answers: dict[int, list[Detections]] = {number: [] for number in range(len(images))}

    def ask(number: int) -> None:
        model = odtk.load(addresses(server)[number % 2])
        for _ in range(12):
            answers[number].append(model.predict(images[number]))
            time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    while min(map(len, answers.values())) < 2:
        time.sleep(0.01)
    server.kill()
    assert any(len(found) < 12 for found in answers.values())  # some are still asking
    time.sleep(1)
    server.start()
    for thread in threads:
        thread.join(300)
    for number, found in answers.items():
        assert len(found) == 12
        for one in found:
            assert_same(one, expected[number])
