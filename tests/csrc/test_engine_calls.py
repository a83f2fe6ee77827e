"""csrc/engine on a TensorRT and a CUDA that compute nothing and print their calls (tests/csrc/fake), without a GPU.

What this shows: which flags, profiles and addresses the engine passes on, in which order things run, are waited for and
die. What TensorRT makes of it needs a GPU (tests/gpu).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.test_plugins import CSRC, TESTS, find_headers
from tests.shared import locked

pytestmark = pytest.mark.slow  # compiles

FAKE = TESTS / "csrc" / "fake"
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-fsanitize=address", "-g1"]
ABSTRACT = {  # header → the classes of which a Default is made
    "NvInferImpl.h": [
        *("VHostMemory", "VRuntime", "VOptimizationProfile", "VCudaEngine", "VExecutionContext", "VTensor"),
        *("VNetworkDefinition", "VTimingCache", "VBuilderConfig", "VBuilder", "VLayer", "VPluginV2Layer"),
        "VCastLayer",
    ],
    "NvInferRuntimeCommon.h": ["IPluginRegistry"],
    "NvOnnxParser.h": ["IParser"],
}
NAMESPACE = {"NvInferImpl.h": "nvinfer1::apiv", "NvInferRuntimeCommon.h": "nvinfer1", "NvOnnxParser.h": "nvonnxparser"}
METHOD = re.compile(r"virtual ([^;{}]*?[\s*&])(\w+)\(([^;{}]*?)\)\s*((?:const)?\s*(?:noexcept)?)\s*=\s*0;", re.DOTALL)


def defaults(headers: Path) -> str:
    """A class DefaultX for each abstract X, whose methods return nothing, null or zero."""
    text = """#include <cstdio>
#include <cstdlib>
#include <type_traits>
template <typename T>
T no_answer(const char* method) {
  if constexpr (std::is_void_v<T>) return;
  else if constexpr (std::is_reference_v<T> || !std::is_default_constructible_v<T>)
    std::fprintf(stderr, "the fake TensorRT has no %s\\n", method), std::abort();
  else return T{};
}
"""
    for header, names in ABSTRACT.items():
        source = re.sub(r"//[^\n]*", "", (headers / header).read_text())
        for name in names:
            found = re.search(rf"^class {name}\b[^;{{]*\{{(.*?)^\}};", source, re.DOTALL | re.MULTILINE)
            assert found, (header, name)
            text += f"namespace {NAMESPACE[header]} {{\nclass Default{name} : public {name} {{\n public:\n"
            for kind, method, parameters, suffix in METHOD.findall(found[1]):
                kind = re.sub(r"\b(virtual|TRT_DEPRECATED|TRT_NODISCARD)\b", "", kind).strip()
                answer = f'no_answer<{kind}>("{method}")'
                text += f"  {kind} {method}({parameters}) {suffix} override {{ return {answer}; }}\n"
            text += f"}};\n}}\nusing {NAMESPACE[header]}::Default{name};\n"
    return text


@dataclass(frozen=True)
class Host:
    """The probe and the folder of the libraries that it opens."""

    major: int
    folder: Path

    def run(self, *steps: str, **environment: str) -> list[str]:
        """The lines that the steps print; "[step]" before each."""
        variables = os.environ | {"TENSORRT_ROOT": str(self.folder), "ASAN_OPTIONS": "detect_leaks=0"} | environment
        result = subprocess.run(
            [str(self.folder / "probe"), *steps], capture_output=True, text=True, errors="replace", env=variables
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()


@pytest.fixture(scope="module", params=[11, 10, 8], ids=["TensorRT11", "TensorRT10", "TensorRT8"])
def host(request: pytest.FixtureRequest) -> Host:
    """Compiled once per state of the sources, under build/fake."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the engine")
    major = request.param
    headers = find_headers(major)
    if not (headers / "NvOnnxParser.h").is_file():
        pytest.skip(f"no NvOnnxParser.h in {headers}")
    watched = [Path(__file__), *CSRC.glob("engine/engine.*"), *CSRC.glob("plugins/*"), *CSRC.glob("cuda/*.h")]
    watched += FAKE.glob("*")
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(watched) if f.is_file()) + f"{headers}".encode())
    folder = TESTS.parent / "build" / "fake" / digest.hexdigest()[:16]
    with locked(folder):
        if not (folder / "probe").exists():
            compile_to(folder, compiler, headers, major)
    return Host(major, folder)


def compile_to(folder: Path, compiler: str, headers: Path, major: int) -> None:
    """Compiles a TensorRT that prints its calls, and the probe with our engine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "defaults.h").write_text(defaults(headers))
    command = [compiler, *FLAGS, f"-I{FAKE}", f"-I{CSRC}", f"-I{folder}", "-isystem", str(headers)]
    sources = [CSRC / "engine" / "engine.cpp", *sorted((CSRC / "plugins").glob("*.cpp")), FAKE / "engine_probe.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    library = folder / f"libnvinfer.so.{major}"
    jobs = [
        [*command, "-w", "-shared", str(FAKE / "tensorrt.cpp"), "-o", str(library)],
        *([*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)),
    ]
    running = [subprocess.Popen(job) for job in jobs]
    assert [process.wait() for process in running] == [0] * len(running), "the engine does not compile"
    for stem in ("libnvonnxparser", "libnvinfer_plugin"):
        (folder / f"{stem}.so.{major}").unlink(missing_ok=True)
        (folder / f"{stem}.so.{major}").symlink_to(library)
    part = folder / "part"
    subprocess.run([compiler, *FLAGS, *map(str, objects), "-o", str(part), "-ldl", "-lpthread"], check=True)
    part.rename(folder / "probe")


def section(lines: Sequence[str], step: str, index: int = 0) -> list[str]:
    """The lines of a step; `index` of several that are the same."""
    starts = [i for i, line in enumerate(lines) if line == f"[{step}]"]
    rest = list(lines[starts[index] + 1 :])
    return rest[: next(i for i, line in enumerate(rest) if line.startswith("["))]


def test_profile_0_is_what_was_asked_and_profile_1_is_batch_1(host: Host) -> None:
    lines = host.run("build batch=1,8,16", "build batch=2,8,16", "build batch=1,1,16")
    profiles = [[line for line in section(lines, f"build batch={b}") if line.startswith("profile")] for b in (
        "1,8,16", "2,8,16", "1,1,16")]  # fmt: skip
    assert profiles == [["profile 1 8 16", "profile 1 1 1"], ["profile 2 8 16"], ["profile 1 1 16"]]


def test_a_batch_of_1_runs_in_its_own_profile(host: Host) -> None:
    lines = host.run("build batch=1,8,16", "load", "infer 1 7 plain 512", "infer 2 7 plain 512", "infer 1 7 plain 512")
    assert "batch 1 16" in section(lines, "load")
    one, two = section(lines, "infer 1 7 plain 512"), section(lines, "infer 2 7 plain 512")
    assert "context 2 profile 1 stream 7" in one and "context 2 run stream 7" in one
    assert "context 1 batch 2" in two and "context 1 run stream 7" in two
    again = section(lines, "infer 1 7 plain 512", 1)
    assert "context 2 run stream 7" in again
    assert not any("profile" in line for line in again), "a context would be set up again at every change"


def test_tensorrt_8_does_without_cublas_and_cudnn(host: Host) -> None:
    lines = host.run("build batch=1,8,16")
    if host.major == 8:
        assert "tactic sources 24" in lines  # of 31: without cuBLAS (1), cuBLASLt (2) and cuDNN (4)
        assert "preview feature 2 1" in lines  # several contexts for one profile
    else:
        assert not any(line.startswith("tactic") for line in lines)  # 10 has them off, 11 has none


def test_full_precision_clears_tf32_and_nothing_else_does(host: Host) -> None:
    flag = "clear flag 7" if host.major == 8 else "clear flag 6"
    assert flag in host.run("build tf32=0")
    assert not any(line.startswith("clear") for line in host.run("build tf32=1"))


def test_compatible_plans(host: Host) -> None:
    flag = {8: 15, 10: 13, 11: 12}[host.major]
    lines = host.run("build hardware=1 version=1")
    assert "hardware compatibility 1" in lines and f"set flag {flag}" in lines
    plain = host.run("build hardware=0 version=0")
    assert not any("compatibility" in line or "set flag" in line for line in plain)


def test_code_for_the_cpu_is_only_run_when_it_is_allowed(host: Host) -> None:
    assert "host code allowed 1" in host.run("build", "load", ODTK_ALLOW_HOST_CODE="1")
    assert not any("host code" in line for line in host.run("build", "load", ODTK_ALLOW_HOST_CODE="0"))


def test_timing_cache_and_progress_outlive_the_builder(host: Host, tmp_path: Path) -> None:
    lines = host.run(f"build cache={tmp_path / 'cache'} progress=1")  # a monitor that is gone fails the sanitizer
    assert "the builder ends, the timing cache exists" in lines
    assert ("progress all 1 1" in lines) == (host.major >= 10)
    assert (tmp_path / "cache").read_text() == "a timing cache"


def test_a_timing_cache_of_another_tensorrt_is_refused(host: Host, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("damaged")
    lines = host.run(f"build cache={tmp_path / 'cache'}")
    assert any(line.startswith(f"error the timing cache {tmp_path / 'cache'} is not one of") for line in lines)
    assert (tmp_path / "cache").read_text() == "damaged"


def test_short_metadata_is_the_name_and_long_metadata_is_in_the_plugin(host: Host) -> None:
    assert "metadata {}" in host.run("build name={}", "load")
    field = " ".join(f"field={int.from_bytes(part, 'little')}" for part in (b"much", b" of ", b"it 1"))
    assert "metadata much of it 1" in host.run(f"build {field}", "load")
    negative = "field=-1 field=1684234849"
    lines = host.run(f"build {negative}", "load", "build", "load")
    assert any(line.startswith("metadata ����abcd") for line in lines), lines
    assert "metadata " in section(lines, "load", 1), "the metadata of another plan"


def test_metadata_that_does_not_fit_a_name_is_refused(host: Host) -> None:
    assert not any(line.startswith("error") for line in host.run("build name_size=4090"))
    assert any("error metadata of 4091 bytes does not fit" in line for line in host.run("build name_size=4091"))


def test_nothing_follows_the_plan_and_old_trailers_are_read(host: Host) -> None:
    """The fake runtime refuses bytes after a plan, as TensorRT's does."""
    assert any("could not load the plan" in line for line in host.run("build", "append more", "load"))
    old = host.run("build", "append {1}", "length 3", "append ODTKMETA", "load")
    assert "metadata {1}" in old


def test_every_run_waits_for_the_one_before_on_the_gpu(host: Host) -> None:
    steps = ("infer 2 7 plain 512", "infer 2 8 plain 512", "infer 2 7 graph 512", "infer 2 8 graph 512")
    lines = host.run("build", "load", *steps)
    assert section(lines, "load")[-3] == "record stream 0"  # profiles are set with copies on a stream
    for step in steps:
        lines_of = section(lines, step)
        stream = step.split()[2]
        work = next(i for i, line in enumerate(lines_of) if re.search(r"run stream|launch graph", line))
        assert lines_of[0] == f"wait stream {stream}", lines_of
        assert lines_of[work + 1] == f"record stream {stream}", lines_of
    assert "launch graph 1 stream 8" in section(lines, steps[-1])


def test_a_graph_is_replayed_only_while_its_context_is_as_it_was_captured(host: Host) -> None:
    steps = ["infer 2 7 graph 512", "infer 4 7 graph 512", "infer 3 7 plain 512", "infer 1 7 graph 512"]
    lines = host.run("build batch=1,8,16", "load", *steps, *steps, "infer 2 7 graph 1024")
    context = ""
    of_graph: dict[str, tuple[str, str]] = {}
    batches: dict[str, str] = {}
    for line in lines:
        if found := re.match(r"context (\d+) (?:run|batch (\d+))", line):
            context = found[1]
            batches[context] = found[2] or batches[context]
        elif found := re.match(r"graph (\d+)", line):
            of_graph[found[1]] = (context, batches[context])
        elif found := re.match(r"launch graph (\d+)", line):
            owner, batch = of_graph[found[1]]
            assert batches[owner] == batch, f"graph {found[1]} of batch {batch} is replayed after {batches[owner]}"
    assert len({owner for owner, _ in of_graph.values()}) == 3, "one context for each batch size"
    assert sum(line.startswith("launch") for line in lines) == 3  # at the second round
    last = section(lines, "infer 2 7 graph 1024")
    assert "destroy graph 1" in last and "graph 4" in last  # other addresses: captured anew
    assert [line for line in lines if line.startswith("allocate")] == ["allocate 1000"]
    memory = {line.split()[-1] for line in lines if re.match(r"context \d+ memory", line)}
    assert memory == {"256"}, "all contexts share one block"


def test_the_memory_is_freed_after_the_last_run(host: Host) -> None:
    lines = host.run("build", "load", "infer 2 7 graph 512")
    end = lines[lines.index("[end]") :]
    assert end.index("synchronize") < end.index("destroy graph 1") < end.index("free")


def test_addresses_must_be_aligned(host: Host) -> None:
    lines = host.run("build", "load", "infer 2 7 plain 384")
    assert section(lines, "infer 2 7 plain 384") == [
        "error the address of 'images' must be aligned to 256 bytes, as TensorRT requires: copy the tensor"
    ]


def test_a_stream_that_is_being_captured_is_refused(host: Host) -> None:
    lines = host.run("build", "load", "capturing 7", "infer 2 7 plain 512")
    assert section(lines, "infer 2 7 plain 512")[0].startswith("error an engine cannot run on a stream that is being")
