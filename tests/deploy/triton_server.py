"""A Triton server for tests: nvidia-pytriton's tritonserver, which has only the Python backend, on a bundle's folder.

ODTK_TRITON_PYTHON names the Python of an environment with nvidia-pytriton and onnxruntime.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).parent / "triton_model" / "model.py"
FACTS = "import sys, sysconfig; print(sysconfig.get_config_var('LIBDIR')); print(sysconfig.get_path('purelib'))"


class TritonServer:
    """The server, on ports of its own.

    Attributes:
        http, grpc: its addresses, HOST:PORT.
        batches: a file with the batches of the model's calls, a line each.
    """

    def __init__(self, python: str, repository: Path, folder: Path) -> None:
        self.python, self.shared = Path(python), f"odtk_test_{os.getpid()}_"
        self.folder, self.batches = folder, folder / "batches.txt"
        self.libraries, self.packages = subprocess.check_output([python, "-c", FACTS], text=True).splitlines()
        version = subprocess.check_output(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
        ).strip()
        self.program = Path(self.packages, "pytriton", "tritonserver")
        shutil.copytree(self.program / "backends", folder / "backends")
        stub = self.program / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, folder / "backends" / "python")
        self.models = Path(shutil.copytree(repository, folder / "models"))
        for config in self.models.glob("*/config.pbtxt"):
            config.write_text(self.with_python(config.read_text()))
            shutil.copy(MODEL, config.parent / "1")
        ports = [free_port(), free_port()]
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports)
        self.command = [
            str(self.program / "bin" / "tritonserver"),
            f"--model-repository={self.models}",
            f"--backend-directory={folder / 'backends'}",
            *("--http-address=127.0.0.1", f"--http-port={ports[0]}"),
            *("--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}"),
            f"--backend-config=python,shm-region-prefix-name={self.shared}",
            *("--allow-metrics=false", "--exit-timeout-secs=3"),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def with_python(self, text: str) -> str:
        """A configuration for the Python backend; the rest of it stays."""
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2 as schema

        config: Any = text_format.Parse(text, schema.ModelConfig())
        assert config.backend == "onnxruntime"
        config.backend = "python"
        config.parameters["BATCHES"].string_value = str(self.batches)
        return text_format.MessageToString(config, as_utf8=True)

    def start(self, seconds: float = 60) -> None:
        """Starts the server and waits until it is ready."""
        paths = f"{self.libraries}:{Path(self.packages, 'nvidia_pytriton.libs')}"
        # The backend's Python is the python3 on the PATH; with numpy 2 it would send empty outputs.
        environment = {"PATH": f"{self.python.parent}:{os.environ['PATH']}", "LD_LIBRARY_PATH": paths}
        log = self.folder / "server.log"
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=1).close()
                return
            time.sleep(0.1)
        self.kill()
        faults = [line for line in log.read_text().splitlines() if line.startswith("E") or "rror" in line]
        pytest.fail("tritonserver does not start:\n" + "\n".join(faults[:5]))

    def stop(self) -> None:
        """Ends the server in order: it removes its shared memory."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

    def kill(self) -> None:
        """kill -9, and of the model's process, which would outlive the server."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None
            for left in Path("/dev/shm").glob(f"{self.shared}*"):
                left.unlink(missing_ok=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serve(repository: Path, folder: Path) -> Iterator[TritonServer]:
    """A running server of a model repository of a bundle; skips the test where there is none."""
    python = os.environ.get("ODTK_TRITON_PYTHON")
    if not python:
        pytest.skip("there is no Triton server: ODTK_TRITON_PYTHON names no Python with nvidia-pytriton")
    server = TritonServer(python, repository, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
