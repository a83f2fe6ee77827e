"""csrc/jetson.sh: kernels, plugins and engine cross-compile for Jetson, and the plugins run there under qemu.

Runs where `make jetson` has been run before, as that downloads compiler, CUDA and TensorRT for aarch64.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc import test_plugins
from tests.csrc.test_plugins import CSRC, Host, find_headers
from tests.kernel_cases import CANDIDATES, HEADS, Candidates, Head
from tests.shared import made_once

pytestmark = pytest.mark.slow  # compiles
WORK = CSRC.parent / "build" / "jetson"


@dataclass(frozen=True)
class JetsonHost(Host):
    """A Host whose files are for aarch64; they run under qemu."""

    def run(self, mode: str, *files: Path) -> subprocess.CompletedProcess[str]:
        command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", self.probe, self.library, self.plugins, mode, *files]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What csrc/jetson.sh prints, for the headers of TensorRT 11 alone."""
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64", "nvcc") if shutil.which(tool) is None]
    if missing or not list(WORK.glob("lean-*")):
        pytest.skip(f"needs {', '.join(missing) or 'what `make jetson` downloads to build/jetson'}")
    scripts = Path(sys.executable).parent  # cmake and ninja
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "TENSORRT_ROOT": str(find_headers(11).parent),
    }

    def build(folder: Path) -> None:
        command = [str(CSRC / "jetson.sh"), "--offline"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        (folder / "said").write_text(result.stdout)

    return (made_once(tmp_path_factory, "jetson", build) / "said").read_text().splitlines()


def test_everything_compiles_and_links(said: list[str]) -> None:
    """For Orin and Thor; Xavier (sm_72) needs a toolkit that still knows it."""
    assert "jetson: sm_87 (Orin): compiled" in said and "jetson: sm_110 (Thor): compiled" in said
    (line,) = (line for line in said if line.startswith("jetson: TensorRT 11."))
    assert "compile without warnings and link" in line
    glibc = re.search(r"needs GLIBC 2\.(\d+)", line)
    assert glibc is not None and int(glibc[1]) <= (31 if (WORK / "debian11").is_dir() else 35)


def test_the_plugins_answer_under_qemu_as_here(said: list[str]) -> None:
    """The script compares every line with this machine's; here: that it had some to compare."""
    for how in ("dlopen", "loadLibrary"):
        answers = (WORK / "aarch64" / how).read_text().splitlines()
        assert "loaded=yes" in answers and sum("=" in answer for answer in answers) >= 80
        assert any(f"under qemu, {how}: creators registered" in line for line in said)


@pytest.fixture
def host(said: list[str]) -> JetsonHost:
    """The probe, and the plugins with emulated kernels, as the script left them."""
    (library,) = WORK.glob("lean-*/tensorrt_lean_libs/libnvinfer_lean.so.*")
    return JetsonHost(library, WORK / "aarch64" / "probe", WORK / "aarch64" / "libodtk_plugins.so")


@pytest.mark.parametrize("head", [h for h in HEADS if h.name in ("plain", "channels_last_half", "rotated")], ids=str)
def test_decode_is_the_reference(host: JetsonHost, head: Head, tmp_path: Path) -> None:
    test_plugins.test_decode_is_the_reference(host, head, tmp_path)


@pytest.mark.parametrize("case", [c for c in CANDIDATES if c.name in ("ties", "rotated")], ids=str)
def test_nms_is_the_reference(host: JetsonHost, case: Candidates, tmp_path: Path) -> None:
    test_plugins.test_nms_is_the_reference(host, case, tmp_path)
