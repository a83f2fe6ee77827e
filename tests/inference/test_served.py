"""A model on a server: requests, what is said when the server refuses or is gone, and what never mixes."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import odtk
from odtk.cli import main
from odtk.config import OdtkError
from odtk.exporting.metadata import Metadata
from odtk.inference import served
from odtk.inference.served import Served

grpc: Any = pytest.importorskip("grpc")
client: Any = pytest.importorskip("tritonclient.grpc")
Servicer: Any = client.service_pb2_grpc.GRPCInferenceServiceServicer

ROWS = 3


def metadata(model: str = "first") -> Metadata:
    """Of a model of two classes for images of 32×32 pixels."""
    places = {"size": (32, 32), "stride": 32, "classes": 2, "categories": None, "precision": "fp32"}
    limits = {"score_threshold": 0.05, "nms_threshold": 0.5, "detections": ROWS, "top_n": 100, "batch": (1, 2, 4)}
    rest = {"box_values": 4, "postprocessing": "detections", "input_type": "uint8", "padding": "black", "model": model}
    return Metadata(**places, **limits, **rest)  # type: ignore[arg-type]


class Server(Servicer):
    """Answers each image with one detection, whose score is its first pixel / 255.

    Attributes:
        faults: gRPC codes with which the next requests end; None answers one.
        batches: images of each request that was answered.
        config: of the model, by name.
    """

    def __init__(self) -> None:
        self.faults: list[object] = []
        self.batches: list[int] = []
        self.model: str | None = "first"
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        client.service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        self.address = f"grpc://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}/cells"
        self.server.start()

    def ModelConfig(self, request, context):  # noqa: N802
        if request.name != "cells":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: {request.name!r}")
        found = client.model_config_pb2.ModelConfig(name="cells", max_batch_size=4)
        if self.model is not None:
            found.parameters["odtk"].string_value = metadata(self.model).to_json()
        return client.service_pb2.ModelConfigResponse(config=found)

    def ModelReady(self, request, context):  # noqa: N802
        return client.service_pb2.ModelReadyResponse(ready=True)

    def ModelInfer(self, request, context):  # noqa: N802
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            context.abort(fault, "as planned")
        count = request.inputs[0].shape[0]
        self.batches.append(count)
        pixels = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(count, 3, 32, 32)
        scores, boxes = np.zeros((count, ROWS), np.float32), np.zeros((count, ROWS, 4), np.float32)
        scores[:, 0], boxes[:, 0] = pixels[:, 0, 0, 0] / np.float32(255), [1, 2, 10, 20]
        answer = client.service_pb2.ModelInferResponse(model_name="cells")
        classes = np.zeros((count, ROWS), np.int64)
        for name, kind, values in (("scores", "FP32", scores), ("boxes", "FP32", boxes), ("classes", "INT64", classes)):
            answer.outputs.add(name=name, datatype=kind, shape=values.shape)
            answer.raw_output_contents.append(values.tobytes())
        return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(served, "PAUSES_SECONDS", (0.01, 0.02))
    made = Server()
    yield made
    made.server.stop(None)


def images(*values: int) -> np.ndarray:
    return np.stack([np.full((3, 32, 32), value, np.uint8) for value in values])


def test_a_model_on_a_server_predicts_as_a_file_does(server: Server) -> None:
    model = odtk.load(server.address)
    found = model.predict([np.full((32, 32, 3), value, np.uint8) for value in (51, 0, 204)])
    assert [one.scores.tolist() for one in found] == [pytest.approx([0.2]), [], pytest.approx([0.8])]
    assert found[0].boxes.tolist() == [[1, 2, 11, 21]] and model.precision == "fp32"
    assert sum(server.batches) == 3 and "(Triton)" in repr(model)


def test_the_commands_take_an_address(server: Server, coco: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "found.json"
    assert main(["infer", server.address, "--images", str(coco), "--output", str(output), "--devices", "cpu"]) == 0
    assert [entry["image_id"] for entry in json.loads(output.read_text())] == [1, 2]
    assert main(["info", server.address, "--json"]) == 0
    assert '"model": "first"' in capsys.readouterr().out
    assert main(["infer", server.address + "x", "--images", str(coco)]) == 1
    assert "unknown model" in capsys.readouterr().err


def test_no_request_holds_more_images_than_the_server_takes(server: Server) -> None:
    scores, boxes, classes = Served(server.address).infer(images(*range(1, 11)))
    assert server.batches == [4, 4, 2] and boxes.shape == (10, ROWS, 4) and classes.dtype == np.int64
    np.testing.assert_allclose(scores[:, 0] * 255, np.arange(1, 11), rtol=1e-6)


def test_a_server_that_was_away_is_asked_again_and_it_is_said_once(server: Server) -> None:
    said: list[str] = []
    model = Served(server.address, said.append)
    server.faults = [None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE]
    scores, *_ = model.infer(images(*range(1, 9)))
    np.testing.assert_allclose(scores[:, 0] * 255, np.arange(1, 9), rtol=1e-6)
    assert len(said) == 1 and "does not answer" in said[0]
    server.faults = [grpc.StatusCode.UNAVAILABLE]
    model.infer(images(1))
    assert len(said) == 2


def test_detections_of_two_models_are_not_mixed(server: Server) -> None:
    model = Served(server.address, lambda text: None)
    server.faults, server.model = [grpc.StatusCode.UNAVAILABLE], "second"
    with pytest.raises(OdtkError, match="another model"):
        model.infer(images(1))


def test_many_threads_get_their_own_answers(server: Server) -> None:
    model, wrong = Served(server.address), []

    def ask(value: int) -> None:
        for _ in range(5):
            if not np.allclose(model.infer(images(value, value))[0][:, 0] * 255, value):
                wrong.append(value)

    threads = [threading.Thread(target=ask, args=(value,)) for value in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(server.batches) == 80


def test_what_goes_wrong_is_one_sentence(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("http://host", "grpc://host:x/m", "http://host:1/a/b"):
        with pytest.raises(OdtkError, match="not the address of a model"):
            Served(address)
    with pytest.raises(OdtkError, match="refuses: Request for unknown model"):
        Served(server.address.replace("cells", "plates"))
    for address in ("grpc://127.0.0.1:1/cells", "http://127.0.0.1:1/cells"):
        with pytest.raises(OdtkError, match=r"does not answer .*refused"):
            Served(address)
    wrong = server.address.replace("grpc:", "http:")
    with pytest.raises(
        OdtkError, match=r"not answer in HTTP \(Expected HTTP.*\): is that the port for HTTP .*8001 gRPC"
    ):
        Served(wrong)
    model = Served(server.address, lambda text: None)
    server.faults = [grpc.StatusCode.INVALID_ARGUMENT]
    with pytest.raises(OdtkError, match="refuses: as planned"):
        model.infer(images(1))
    monkeypatch.setattr(served, "PATIENCE_SECONDS", 0.1)
    server.faults = [grpc.StatusCode.UNAVAILABLE] * 99
    with pytest.raises(OdtkError, match="start the server"):
        model.infer(images(1))
    server.model = None
    with pytest.raises(OdtkError, match="was not exported by odtk"):
        Served(server.address)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(OdtkError, match=r"pip install 'odtk\[triton\]'"):
        Served(server.address)


@pytest.mark.parametrize("ends", [False, True])
def test_grpc_on_another_port_asks_for_the_port(ends: bool) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            if not ends:  # "Failed parsing HTTP/2"; else "Socket closed", or a reset
                super().handle()

        def log_message(self, *words: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(OdtkError, match=r"does not answer in gRPC .*is that the port for gRPC \(Triton: 8000 HTTP"):
            Served(f"grpc://127.0.0.1:{other.server_port}/cells")
        other.shutdown()
