"""csrc/plugins in real TensorRT libraries, without a GPU: the lean runtime of TensorRT 11 and the whole TensorRT 8.6.

The plugins are compiled against the headers of each version, with the emulated kernels of tests/emulation, and
tests/csrc/plugins_probe.cpp calls them as TensorRT does. Needed are headers in $TENSORRT_ROOT/include or
/opt/tensorrt-*/include, libraries in the Python package tensorrt_lean_libs (pip install tensorrt-lean-cu13-libs) or in
the folders of $ODTK_TENSORRT_LIBS.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from odtk import ops
from odtk.box_coder import BOX_CODERS
from tests import emulation
from tests import kernel_cases as cases
from tests.kernel_cases import CANDIDATES, HEADS, Candidates, Head, Triple
from tests.shared import locked

pytestmark = pytest.mark.slow  # compiles

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"
PROBE = TESTS / "csrc" / "plugins_probe.cpp"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
LIBRARIES = {11: ("libnvinfer_lean.so.11", "libnvinfer.so.11"), 8: ("libnvinfer.so.8",)}
TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3}  # nvinfer1::DataType
LINEAR, HWC8, HWC = 0, 2, 8  # nvinfer1::TensorFormat


@dataclass(frozen=True)
class Host:
    """A TensorRT library, with the probe and the plugins compiled for it."""

    library: Path
    probe: Path
    plugins: Path

    def run(self, mode: str, *files: Path) -> subprocess.CompletedProcess[str]:
        command = [self.probe, self.library, self.plugins, mode, *files]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def find_headers(major: int) -> Path:
    root = os.environ.get("TENSORRT_ROOT")
    places = [Path(root) / "include"] if root else []
    places += [*sorted(Path("/opt").glob("tensorrt*/include"), reverse=True), Path("/usr/include")]
    for place in places:
        version = place / "NvInferVersion.h"
        if version.is_file() and any(
            line.split()[1:3] in (["NV_TENSORRT_MAJOR", str(major)], ["TRT_MAJOR_ENTERPRISE", str(major)])
            for line in version.read_text().splitlines()
            if line.startswith("#define")
        ):
            return place
    pytest.skip(f"no headers of TensorRT {major} in $TENSORRT_ROOT/include, /opt/tensorrt*/include or /usr/include")


def find_library(major: int) -> Path:
    folders = [Path(f) for f in os.environ.get("ODTK_TENSORRT_LIBS", "").split(os.pathsep) if f]
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    if spec is not None and spec.submodule_search_locations:
        folders.append(Path(next(iter(spec.submodule_search_locations))))
    for folder in folders:
        for name in LIBRARIES[major]:
            if (folder / name).is_file():
                return folder / name
    pytest.skip(f"no {' or '.join(LIBRARIES[major])} in tensorrt_lean_libs or $ODTK_TENSORRT_LIBS")


def compile_host(major: int) -> Host:
    """Compiled once per state of the sources, under build/plugins."""
    headers, library = find_headers(major), find_library(major)
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the plugins")
    plugins, kernels = sorted((CSRC / "plugins").glob("*.cpp")), [CSRC / "cuda" / f"{n}.cu" for n in ("decode", "nms")]
    watched = [
        *CSRC.glob("plugins/*"),
        *CSRC.glob("cuda/*"),
        *TESTS.glob("emulation/*.h"),
        PROBE,
    ]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(watched)) + f"{FLAGS}{headers}".encode())
    folder = TESTS.parent / "build" / "plugins" / digest.hexdigest()[:16]
    host = Host(library, folder / "probe", folder / "libodtk_plugins.so")
    command = [compiler, *FLAGS, "-isystem", str(headers), f"-I{emulation.HERE}", f"-I{CSRC}"]
    with locked(folder):
        if not host.plugins.exists():
            compile_to(host, command, [*plugins, *kernels])
    return host


def compile_to(host: Host, command: list[str], sources: list[Path]) -> None:
    """Compiles the sources and the probe side by side, by this command and what each needs besides."""
    folder = host.plugins.parent
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([*command, "-x", "c++", "-c", str(source), "-o", str(target)])
        for source, target in zip(sources, objects, strict=True)
    ]
    running.append(subprocess.Popen([*command, str(PROBE), "-o", str(host.probe), "-ldl"]))
    assert [process.wait() for process in running] == [0] * len(running), "plugins or probe do not compile"
    part = folder / "part.so"
    link = [command[0], "-shared", "-Wl,--no-undefined", *map(str, objects), "-o", str(part), "-ldl", "-lpthread"]
    subprocess.run(link, check=True)
    part.rename(host.plugins)


@pytest.fixture(scope="module", params=[11, 8], ids=["TensorRT11", "TensorRT8"])
def host(request: pytest.FixtureRequest) -> Host:
    return compile_host(request.param)


@dataclass(frozen=True)
class Answers:
    """What the probe printed: its answers, and the first line of the log after each step that it announced."""

    values: dict[str, str]
    log: dict[str, str]


@pytest.fixture(scope="module", params=["dlopen", "loadLibrary"])
def answers(host: Host, request: pytest.FixtureRequest) -> Answers:
    result = host.run(request.param)
    assert result.returncode == 0, result.stderr
    log: dict[str, str] = {}
    step = ""
    for line in result.stderr.splitlines():
        if line.startswith("["):
            step = line.strip("[]")
        else:
            log.setdefault(step, line)
    return Answers(dict(line.split("=", 1) for line in result.stdout.splitlines()), log)


def test_creators_register_and_list_their_fields(answers: Answers) -> None:
    assert answers.values["loaded"] == "yes"
    assert answers.values["fields.OdtkDecode"] == "strides:5 classes:5 coder:5 score_threshold:1 top_n:5"
    assert answers.values["fields.OdtkNms"] == "box_values:5 threshold:1 detections:5 metadata:5"


def test_the_interface_is_that_of_the_version(answers: Answers) -> None:
    version, generation = int(answers.values["version"]), answers.values["generation"]
    assert (version >= 100000, generation) in ((True, "3"), (False, "2"))


def test_plugins_are_made_from_good_fields(answers: Answers) -> None:
    assert answers.values["decode.good"] == answers.values["nms.good"] == "made"
    assert "decode.good" not in answers.log


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        *((f"decode.missing.{f}", f"'{f}' is missing") for f in ("strides", "classes", "coder", "top_n")),
        ("decode.missing.score_threshold", "'score_threshold' is missing"),
        ("decode.float_classes", "'classes' must be int32"),
        ("decode.int_threshold", "'score_threshold' must be float32"),
        ("decode.two_classes", "'classes' must be one number, not 2"),
        ("decode.zero_classes", "'classes' must be positive, not 0"),
        ("decode.zero_stride", "'strides' must be positive, not 0"),
        ("decode.null_strides", "'strides' is empty"),
        ("decode.bad_coder", "'coder' is 3, but there is no box coder with that number"),
        ("decode.bad_threshold", "'score_threshold' must lie in"),
        ("decode.zero_top_n", "'top_n' must lie in 1 … 4096, not 0"),
        ("decode.many_top_n", "'top_n' must lie in 1 … 4096, not 99999"),
        ("decode.unknown", "'top_k' is not a field"),
        ("decode.twice", "'strides' was given twice"),
        ("decode.empty", "'strides' is missing"),
        *((f"nms.missing.{f}", f"'{f}' is missing") for f in ("box_values", "threshold", "detections")),
        ("nms.bad_box_values", "'box_values' must be 4 or 6"),
        ("nms.bad_threshold", "'threshold' must lie in [0, 1]"),
        ("nms.zero_detections", "'detections' must be positive"),
        ("nms.metadata.float", "'metadata' must be int32"),
    ],
)
def test_bad_fields_are_refused_with_the_reason(answers: Answers, key: str, reason: str) -> None:
    assert answers.values[key] == "refused"
    assert reason in answers.log[key]
    assert answers.log[key].startswith("OdtkDecode: field" if key.startswith("decode") else "OdtkNms: field")


@pytest.mark.parametrize("plugin", ["decode", "nms"])
def test_engines_of_earlier_versions_are_read(answers: Answers, plugin: str) -> None:
    """They hold the fields coder and box_values under the name values. Both names together are refused."""
    assert answers.values[f"{plugin}.former_name"] == "made"
    assert answers.values[f"{plugin}.former_name.state"] == answers.values[f"{plugin}.state"]
    assert answers.values[f"{plugin}.both_names"] == "refused"
    assert "'values' is not a field" in answers.log[f"{plugin}.both_names"]


def test_output_shapes_and_types(answers: Answers) -> None:
    """Level 0 has 120 candidates, of which 100 (top_n) stay, level 1 has 36 (FCOS: 60 and 18). 0: fp32, 3: int32."""
    assert answers.values["decode.shapes"] == "Nx136 Nx136x4 Nx136"
    assert answers.values["decode.shapes.rotated"] == "Nx136 Nx136x6 Nx136"
    assert answers.values["decode.shapes.fcos"] == "Nx78 Nx78x4 Nx78"
    assert answers.values["decode.shapes.distances"] == "Nx78 Nx78x4 Nx78"
    assert answers.values["nms.shapes"] == "Nx100 Nx100x6 Nx100"
    assert answers.values["decode.types"] == answers.values["nms.types"] == "3: 0 0 3"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("decode.shapes.no_anchors", "field 'strides' has 2, so there must be 5 inputs"),
        ("decode.shapes.channels", "boxes of level 1 must be [N, 8, h, w], not [N, 9, h, w]"),
        ("nms.shapes.values", "boxes must have 6 values"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(answers: Answers, key: str, reason: str) -> None:
    assert answers.values[key] == ""
    assert reason in answers.log[key]


def test_types_and_formats(answers: Answers) -> None:
    asked = {key: answer for key, answer in answers.values.items() if key.startswith("decode.supports.")}
    taken = {key.removeprefix("decode.supports.") for key, answer in asked.items() if answer == "yes"}
    assert len(asked) > len(taken)
    assert taken == {"float", "half", "half_hwc8", "float_hwc", "float_boxes", "anchors", "outputs"}


def test_workspace_grows_with_the_batch(answers: Answers) -> None:
    for plugin in ("decode", "nms"):
        assert 0 < int(answers.values[f"{plugin}.workspace.1"]) < int(answers.values[f"{plugin}.workspace.16"])


def test_serialization_and_clones_keep_everything(answers: Answers) -> None:
    for plugin in ("decode", "nms"):
        assert len(answers.values[f"{plugin}.state"]) > 40
        assert answers.values[f"{plugin}.deserialized"] == answers.values[f"{plugin}.cloned"] == "same"
        assert answers.values[f"{plugin}.cut"] == "refused"


def test_a_plugin_carries_metadata_of_any_length(answers: Answers) -> None:
    """Behind its other fields, so that plans with and without it are read by the same code."""
    values = {
        key.removeprefix("nms.metadata."): v for key, v in answers.values.items() if key.startswith("nms.metadata")
    }
    expected = {"kept": "yes", "only_adds": "yes", "deserialized": "same", "cloned": "same", "float": "refused"}
    assert values == expected


# ---- the plugins at work, on the emulated kernels ----


def as_hwc(tensor: Tensor, multiple: int) -> Tensor:
    """[N, C, h, w] as TensorRT's channels-last formats hold it: [N, h, w, C rounded up], NaN where it is padding."""
    n, c, h, w = tensor.shape
    memory = torch.full((n, h, w, -(-c // multiple) * multiple), float("nan"), dtype=tensor.dtype)
    memory[..., :c] = tensor.permute(0, 2, 3, 1)  # [N, h, w, C]
    return memory


class Script:
    """What the probe reads to run one plugin."""

    def __init__(self, folder: Path, plugin: str) -> None:
        self.folder = folder / plugin
        self.folder.mkdir()
        self.lines = [f"plugin {plugin}"]
        self.outputs: list[tuple[Path, torch.dtype, tuple[int, ...]]] = []

    def field(self, kind: str, name: str, *values: float) -> None:
        self.lines.append(f"{kind} {name} {' '.join(map(str, values))}")

    def input(self, tensor: Tensor, layout: int = LINEAR) -> None:
        memory = tensor if layout == LINEAR else as_hwc(tensor, 8 if layout == HWC8 else 1)
        path = self.folder / f"{len(self.lines)}.in"
        path.write_bytes(memory.contiguous().numpy().tobytes())
        self.lines.append(f"input {TYPES[tensor.dtype]} {layout} {' '.join(map(str, tensor.shape))} {path}")

    def output(self, dtype: torch.dtype, *shape: int) -> None:
        path = self.folder / f"{len(self.lines)}.out"
        self.outputs.append((path, dtype, shape))
        self.lines.append(f"output {TYPES[dtype]} {' '.join(map(str, shape))} {path}")

    def write(self) -> Path:
        path = self.folder / "script"
        path.write_text("\n".join(self.lines))
        return path

    def results(self) -> Sequence[Tensor]:
        kinds = {torch.float32: np.float32, torch.int32: np.int32}
        return [torch.from_numpy(np.fromfile(p, kinds[t]).reshape(s)) for p, t, s in self.outputs]


def run(host: Host, script: Script) -> Triple:
    result = host.run("run", script.write())
    assert result.returncode == 0, result.stderr
    scores, boxes, classes = script.results()
    return scores, boxes, classes.long()


AT_WORK = (
    *("plain", "half", "channels_last", "channels_last_half", "rotated_channels_last_half", "fcos", "ten_levels"),
    *("not_a_number", "distances", "distances_channels_last_half", "turned", "turned_channels_last_half"),
)


@pytest.mark.parametrize("head", [h for h in HEADS if h.name in AT_WORK], ids=str)
def test_decode_is_the_reference(host: Host, head: Head, tmp_path: Path) -> None:
    logits, boxes, anchors, strides = cases.make(head)
    script = Script(tmp_path, "OdtkDecode")
    script.field("int", "strides", *strides)
    script.field("int", "classes", head.classes)
    script.field("int", "coder", BOX_CODERS[head.coder].number)
    script.field("int", "top_n", head.top_n)
    script.field("float", "score_threshold", head.threshold)
    layout = LINEAR if not head.channels_last else HWC8 if head.half else HWC
    for tensor in (*logits, *boxes):
        script.input(tensor, layout)
    script.input(torch.stack([a[:, :4] for a in anchors]))
    expected = cases.reference(head)
    columns = expected[0].shape[1]
    script.output(torch.float32, head.batch, columns)
    script.output(torch.float32, head.batch, columns, expected[1].shape[2])
    script.output(torch.int32, head.batch, columns)
    cases.assert_same(run(host, script), expected)


@pytest.mark.parametrize("case", [c for c in CANDIDATES if c.name in ("plain", "ties", "rotated")], ids=str)
def test_nms_is_the_reference(host: Host, case: Candidates, tmp_path: Path) -> None:
    scores, boxes, classes = cases.candidates(case)
    script = Script(tmp_path, "OdtkNms")
    script.field("int", "box_values", case.box_values)
    script.field("int", "detections", case.detections)
    script.field("float", "threshold", case.threshold)
    script.input(scores)
    script.input(boxes)
    script.input(classes.int())
    script.output(torch.float32, case.batch, case.detections)
    script.output(torch.float32, case.batch, case.detections, case.box_values)
    script.output(torch.int32, case.batch, case.detections)
    expected = ops.nms_reference(scores, boxes, classes, threshold=case.threshold, detections=case.detections)
    cases.assert_same(run(host, script), expected)
