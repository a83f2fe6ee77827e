"""examples/cpp/detect.cpp: what it says of a bundle and an image, up to the point where it needs a GPU.

It is compiled against TensorRT's headers, and linked to the lean runtime of TensorRT 11.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odtk.deploy import manifest
from odtk.deploy.bundle import metadata_of
from tests.csrc.test_plugins import find_headers, find_library

pytestmark = pytest.mark.slow  # compiles

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "cpp" / "detect.cpp"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@pytest.fixture(scope="module")
def detect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    cudart = CUDA / "lib64" / "libcudart_static.a"
    needed = [cudart, Path("/usr/include/nlohmann/json.hpp"), Path("/usr/include/openssl/evp.h")]
    lacking = [str(path) for path in needed if not path.exists()] + ([] if shutil.which("g++") else ["g++"])
    if lacking:
        pytest.skip(f"no {', '.join(lacking)} to compile the example")
    headers, library = find_headers(11), find_library(11)
    made = tmp_path_factory.mktemp("example") / "detect"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-isystem", str(headers), f"-isystem{CUDA}/include"]
    libraries = [str(library), f"-Wl,-rpath,{library.parent}", str(cudart), "-lcrypto", "-ldl", "-lrt", "-lpthread"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(made), *libraries], check=True)
    return made


@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose engine and plugins are no such files, but stand in the manifest."""
    folder = Path(shutil.copytree(bundle, tmp_path / "served"))
    (folder / "model.plan").write_bytes(b"plan")
    (folder / "libodtk_plugins.so").write_bytes(b"plugins")
    manifest.finish(str(folder), "now", metadata_of(str(folder / "model.onnx")))
    return folder


def said(detect: Path, folder: Path, image: Path) -> str:
    """What the program says as it fails."""
    result = subprocess.run([str(detect), str(folder), str(image)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and not result.stdout and result.stderr.count("\n") == 1, result
    return result.stderr


def picture(path: Path, width: int, height: int) -> Path:
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    return path


def test_a_bundle_is_read_and_checked_and_then_a_gpu_is_needed(
    detect: Path, bundle: Path, served: Path, tmp_path: Path
) -> None:
    image = picture(tmp_path / "photo.ppm", 60, 40)
    assert "the bundle has no model.plan: export it where" in said(detect, bundle, image)
    assert "is no 8-bit P6 image of at most 64x64 pixels" in said(detect, served, picture(tmp_path / "x.ppm", 65, 4))
    if not torch.cuda.is_available():
        assert "an engine needs a GPU, and CUDA finds none" in said(detect, served, image)
    short = tmp_path / "short.ppm"
    short.write_bytes(image.read_bytes()[:-1])
    assert "ends too early" in said(detect, served, short)
    (served / "model.plan").write_bytes(b"another")
    assert "model.plan is not as it was written" in said(detect, served, image)
    (served / "manifest.json").write_text('{"kind": "odtk bundle", "schema": 1}')
    assert "manifest.json is damaged" in said(detect, served, image)
    assert "there is no file" in said(detect, tmp_path, image)
