"""A model on a Triton server: what it says of itself, and images → outputs over HTTP or gRPC.

The address is http://HOST:PORT/NAME or grpc://HOST:PORT/NAME; https and grpcs are encrypted. The client is NVIDIA's
tritonclient (extra ``triton``), which is imported when a server is asked.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ..config import OdtkError
from ..exporting.metadata import Metadata
from ..text import printable, say

PARAMETER = "odtk"  # of config.pbtxt: the file's metadata
OUTPUTS = ("scores", "boxes", "classes")
PORTS = {"http": 8000, "https": 8000, "grpc": 8001, "grpcs": 8001}
PATIENCE_SECONDS = 60.0  # for a server that does not answer, or is starting again
PAUSES_SECONDS = (0.2, 2.0)  # between two attempts: at first, and at most; doubled in between
ADDRESS = re.compile(r"(?P<scheme>https?|grpcs?)://(?P<host>\[[^\]/]+\]|[^:/\s]+)(:(?P<port>\d+))?/(?P<name>[^/\s]+)/?")
# What a client says of a port where something answers, but in another protocol (or ends the connection).
OTHER_PROTOCOL = re.compile(r"(?i)expected HTTP|parse error|parsing HTTP|socket closed|connection closed|reset by peer")
T = TypeVar("T")


def is_address(path: str) -> bool:
    """Whether a model is given as the address of a server, not as a file."""
    return re.match(r"(https?|grpcs?)://", path) is not None


class Served:
    """One model of a server. May be called by several threads.

    A request that finds no server, or loses it on its way, is sent again once the server is back: inference changes
    nothing there. The server must then have the same model.

    Attributes:
        metadata: what the model's file says of itself.
        max_batch: the most images in one request.
    """

    def __init__(self, address: str, log: Callable[[str], None] = say) -> None:
        """
        Raises:
            OdtkError: the address is none, tritonclient is missing, the server does not answer, or it has no such
                model from a bundle of odtk.
        """
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise OdtkError(f"{printable(address)} is not the address of a model: write http://HOST:8000/NAME.")
        self.address, self.log, self.model = address, log, found["name"]
        self.grpc, self.encrypted = found["scheme"].startswith("grpc"), found["scheme"].endswith("s")
        self.url = f"{found['host']}:{found['port'] or PORTS[found['scheme']]}"
        try:
            if self.grpc:
                import tritonclient.grpc as client
            else:
                import tritonclient.http as client
        except ImportError as error:
            raise OdtkError(
                f"{address} needs tritonclient, which cannot be imported: `pip install 'odtk[triton]'` ({error})."
            ) from error
        self.client = client
        self.local = threading.local()  # a client is for one thread
        self.lock, self.told = threading.Lock(), False
        self.metadata, self.max_batch = self.describe(self.first_config())

    def connection(self) -> Any:
        """This thread's client."""
        if not hasattr(self.local, "client"):
            timeouts = (
                {} if self.grpc else {"connection_timeout": PATIENCE_SECONDS, "network_timeout": PATIENCE_SECONDS}
            )
            self.local.client = self.client.InferenceServerClient(self.url, ssl=self.encrypted, **timeouts)
        return self.local.client

    def first_config(self) -> dict[str, Any]:
        """The model's configuration; asks nothing twice, and knows the server's other port by its answer."""
        try:
            return self.patiently(self.config, seconds=0)
        except OdtkError as error:
            if not isinstance(error.__cause__, Exception) or not OTHER_PROTOCOL.search(self.words(error.__cause__)):
                raise
            kind = "gRPC" if self.grpc else "HTTP"
            raise OdtkError(
                f"{self.address} does not answer in {kind} ({self.words(error.__cause__)}): is that the port for "
                f"{kind} (Triton: 8000 HTTP, 8001 gRPC), and does the server run?"
            ) from error.__cause__

    def config(self) -> dict[str, Any]:
        """The model's configuration, as the server has it."""
        if self.grpc:
            found = self.connection().get_model_config(self.model, as_json=True)["config"]
            return {"max_batch_size": int(found.get("max_batch_size", 0)), **found}
        return self.connection().get_model_config(self.model)

    def describe(self, config: dict[str, Any]) -> tuple[Metadata, int]:
        """The metadata in a configuration, and the most images in one request.

        Raises:
            OdtkError: it has none, or it is damaged.
        """
        text = config.get("parameters", {}).get(PARAMETER, {}).get("string_value")
        if text is None:
            raise OdtkError(
                f"{self.address} was not exported by odtk: its config.pbtxt has no parameter {PARAMETER!r}, as the one "
                "in the folder triton of a bundle has."
            )
        return Metadata.from_json(text, self.address), max(1, int(config.get("max_batch_size", 0)))

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for images [N, 3, H, W] of the type that the model takes: scores, boxes and classes.

        Raises:
            OdtkError: the server refuses them, does not come back, or comes back with another model.
        """
        parts = [images[i : i + self.max_batch] for i in range(0, len(images), self.max_batch)]
        answers = [self.patiently(functools.partial(self.request, part)) for part in parts]
        return tuple(np.concatenate(values) for values in zip(*answers, strict=True))

    def request(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for at most max_batch images."""
        kind = {"uint8": "UINT8", "float32": "FP32"}[images.dtype.name]
        given = self.client.InferInput("images", list(images.shape), kind)
        given.set_data_from_numpy(np.ascontiguousarray(images))
        wanted = [self.client.InferRequestedOutput(name) for name in OUTPUTS]
        limit = {"client_timeout": PATIENCE_SECONDS} if self.grpc else {}
        answer = self.connection().infer(self.model, [given], outputs=wanted, **limit)
        return tuple(answer.as_numpy(name) for name in OUTPUTS)

    def patiently(self, ask: Callable[[], T], seconds: float | None = None) -> T:
        """What a question to the server gives; asked again while the server is gone, for that long (None: PATIENCE)."""
        seconds = PATIENCE_SECONDS if seconds is None else seconds
        try:
            return ask()
        except Exception as error:
            if not self.gone(error):
                raise self.refusal(error) from error
            reason = error
        if seconds:
            self.tell(f"{self.address} does not answer ({self.words(reason)}): waiting up to {seconds:g} s for it.")
        end, pause = time.monotonic() + seconds, PAUSES_SECONDS[0]
        while time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_SECONDS[1])
            self.forget()
            try:
                self.same_model()
                found = ask()
                self.told = False
                return found
            except OdtkError:
                raise
            except Exception as error:
                reason = error
                if not self.gone(error) and self.ready():
                    raise self.refusal(error) from error
        raise OdtkError(
            f"{self.address} does not answer ({self.words(reason)}): start the server, or correct the address."
        ) from reason

    def tell(self, text: str) -> None:
        """Says that the server is away: once for all threads, until it has answered again."""
        with self.lock:
            told, self.told = self.told, True
        if not told:
            self.log(text)

    def forget(self) -> None:
        """Closes this thread's client: a broken connection may stay broken."""
        client = self.local.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def same_model(self) -> None:
        """Refuses a server that has come back with another model: detections of two must not be mixed."""
        metadata, _ = self.describe(self.config())
        if metadata.model != self.metadata.model:
            raise OdtkError(
                f"{self.address} came back with another model ({metadata.model}, before {self.metadata.model}): start "
                "again, so that all detections are of one."
            )

    def ready(self) -> bool:
        """Whether the server says that the model is ready."""
        try:
            return bool(self.connection().is_model_ready(self.model))
        except Exception:
            return False

    def gone(self, error: Exception) -> bool:
        """Whether an error means that the server is away, rather than that it refuses."""
        status = getattr(error, "status", lambda: None)()
        if status is None:  # not an answer: the connection failed, was closed or timed out
            return isinstance(error, (OSError, EOFError)) or type(error).__module__.startswith("geventhttpclient")
        return str(status) in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "502", "503", "504")

    def refusal(self, error: Exception) -> OdtkError:
        """One sentence for what the server refuses."""
        return OdtkError(f"{self.address} refuses: {self.words(error)}")

    def words(self, error: Exception) -> str:
        """An error's message in one line."""
        text = getattr(error, "message", lambda: "")() or str(error) or type(error).__name__
        if type(error).__name__ == "HTTPParseError":  # whose string is a tuple
            text = error.args[0]
        return printable(str(text).strip().splitlines()[0][:200])
