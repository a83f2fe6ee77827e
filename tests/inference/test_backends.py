"""Backends: a .pth and its .onnx give the same Detections, and each wrong file or flag its sentence."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from odtk.categories import Category
from odtk.config import ROTATED_ANGLES, ExportConfig, LoaderConfig, ModelConfig, OdtkError, PostprocessConfig
from odtk.exporting import export
from odtk.exporting.graph import serialize, trace
from odtk.exporting.metadata import FORMAT, Metadata
from odtk.inference import backends
from odtk.inference.infer import loader_config
from odtk.model import checkpoint
from odtk.model.detector import normalize
from tests.random_models import detector_of, pixels_of, save

CONFIG = ModelConfig(backbones=("ResNet18C4",), classes=2)
LIMITS = PostprocessConfig(score_threshold=0.3, detections=20)


def make(folder: Path, config: ModelConfig, input_type: str = "uint8") -> tuple[str, str]:
    """Paths of a checkpoint and its fp32 export at 32×48."""
    path = str(folder / "model.onnx")
    pth = save(detector_of(config, bias=0.0), folder, (Category(3, "cat"), Category(7, "dog")))
    wanted = ExportConfig(path=pth, output=path, size=(32, 48), precision="fp32", postprocess=LIMITS)
    export.export(dataclasses.replace(wanted, input_type=input_type))
    return pth, path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make(tmp_path_factory.mktemp("model"), CONFIG)


def open_cpu(path: str, thresholds: PostprocessConfig | None = None, precision: str = "fp32") -> backends.Backend:
    return backends.open_backend(path, device="cpu", precision=precision, thresholds=thresholds)


def images() -> Tensor:
    return pixels_of(3, (32, 48))


def assert_same(pth: str, path: str) -> None:
    a, b = open_cpu(pth, LIMITS)(images()), open_cpu(path)(images())
    assert (a.scores > 0).sum() > 5 and a.classes.dtype == b.classes.dtype == torch.int64
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.boxes, b.boxes, atol=0.1, rtol=0)
    torch.testing.assert_close(a.classes, b.classes)


def test_torch_and_onnx_agree(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert_same(*paths)
    assert "score above 0.3, NMS at IoU 0.5, at most 20 detections" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["retinanet", "dense"])
def test_rotated_detections_agree(tmp_path: Path, head: str) -> None:
    pth, path = make(tmp_path, dataclasses.replace(CONFIG, head=head, angles=ROTATED_ANGLES))
    assert_same(pth, path)
    assert open_cpu(path)(images()).boxes.shape == (3, 20, 6)


def test_backends_describe_themselves(paths: tuple[str, str]) -> None:
    pth, exported = map(open_cpu, paths)
    assert (pth.size, exported.size) == (None, (32, 48))
    assert pth.stride == exported.stride == 16 and pth.classes == exported.classes == 2
    assert pth.categories == exported.categories == (Category(3, "cat"), Category(7, "dog"))
    assert not pth.rotated and not exported.rotated
    assert exported.precision == "fp32" and open_cpu(paths[0], precision="mixed").precision == "fp32"


def test_an_onnxruntime_without_cuda_runs_on_the_cpu(paths: tuple[str, str]) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    said: list[str] = []
    backend = backends.open_backend(paths[1], device="cuda:0", precision="mixed", thresholds=None, log=said.append)
    assert "runs on the CPU" in said[0] and "Thresholds in" in said[1]
    assert torch.equal(backend(images()).scores, open_cpu(paths[1])(images()).scores)


def test_bf16_is_close(paths: tuple[str, str]) -> None:
    limits = dataclasses.replace(LIMITS, nms_threshold=1.0)  # one suppressed box more or less would shift all rows
    expected, found = (open_cpu(paths[0], limits, p)(images()).scores for p in ("fp32", "bf16"))
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert not torch.equal(found, expected)


def test_an_expressly_given_threshold_is_refused_even_if_it_is_the_default() -> None:
    asked = PostprocessConfig()
    with pytest.raises(OdtkError, match=r"--score-threshold 0\.05 is below the 0\.3"):
        backends.narrowed_thresholds("m.onnx", LIMITS, asked, explicit=("score_threshold",))
    with pytest.raises(OdtkError, match=r"--detections 100 is above the 20"):
        backends.narrowed_thresholds("m.onnx", LIMITS, asked, explicit=("detections",))
    assert backends.narrowed_thresholds("m.onnx", LIMITS, asked, explicit=("nms_threshold",)) == LIMITS


@pytest.mark.parametrize("rotated", [False, True])
def test_a_higher_score_threshold_and_fewer_detections_are_applied_to_what_the_file_gives(
    tmp_path: Path, rotated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly what a checkpoint with these thresholds gives."""
    pth, path = make(tmp_path, dataclasses.replace(CONFIG, angles=ROTATED_ANGLES if rotated else ()))
    scores = open_cpu(path)(images()).scores
    ordered = scores[scores > 0].sort().values
    middle = float(ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
    for asked, rows in (
        (dataclasses.replace(LIMITS, score_threshold=middle), 20),
        (dataclasses.replace(LIMITS, detections=2), 2),
        (dataclasses.replace(LIMITS, score_threshold=middle, detections=7), 7),
    ):
        narrowed, expected = open_cpu(path, asked), open_cpu(pth, asked)(images())
        found = narrowed(images())
        assert narrowed.thresholds == asked and "Of these, kept are scores above" in capsys.readouterr().out
        assert found.scores.shape == (3, rows) and (found.scores > 0).sum() == (expected.scores > 0).sum() > 0
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.boxes, expected.boxes, atol=0.1, rtol=0)
        torch.testing.assert_close(found.classes, expected.classes)


def test_a_contradicting_threshold_is_refused(paths: tuple[str, str]) -> None:
    open_cpu(paths[1], PostprocessConfig())  # defaults mean no preference
    open_cpu(paths[1], LIMITS)
    with pytest.raises(OdtkError, match="--nms-threshold 0.6 contradicts the 0.5 in .*model.onnx"):
        open_cpu(paths[1], dataclasses.replace(LIMITS, nms_threshold=0.6))


def test_wrong_files_are_refused(tmp_path: Path, paths: tuple[str, str]) -> None:
    foreign = onnx.load(paths[1])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    (tmp_path / "model.tflite").touch()
    newer = onnx.load(paths[1])
    newer.metadata_props[0].value = newer.metadata_props[0].value.replace(f'"format":{FORMAT}', '"format":99')
    onnx.save(newer, tmp_path / "newer.onnx")
    damaged = onnx.load(paths[1])
    damaged.metadata_props[0].value = damaged.metadata_props[0].value[:40]
    onnx.save(damaged, tmp_path / "damaged.onnx")
    for name, sentence in {
        "foreign.onnx": "was not exported by odtk",
        "broken.onnx": "is not a model that ONNX Runtime can run",
        "model.tflite": "must end in",
        "missing.pth": "There is no model",
        "newer.onnx": "newer odtk",
        "damaged.onnx": "is damaged",
    }.items():
        with pytest.raises(OdtkError, match=sentence):
            open_cpu(str(tmp_path / name))


def test_an_engine_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "model.plan").touch()
    with pytest.raises(OdtkError, match="needs a GPU"):
        open_cpu(str(tmp_path / "model.plan"))


def test_a_plan_runs_without_onnx() -> None:
    """Nothing on the way from images to detections imports onnx, which only export needs."""
    code = (
        "import sys; sys.modules['onnx'] = None  # an import of it fails\n"
        "import odtk.inference.backends, odtk.inference.infer, odtk.evaluation.benchmark, odtk.evaluation.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metadata_of_the_first_format_are_read(paths: tuple[str, str]) -> None:
    text = onnx.load(paths[1]).metadata_props[0].value
    first = text.replace(f'"format":{FORMAT}', '"format":1').replace('"postprocessing":', '"ending":')
    assert '"ending":"detections"' in first and '"format":1' in first
    assert Metadata.from_json(first, "m.onnx") == Metadata.from_json(text, "m.onnx")


def test_how_images_are_prepared_is_kept_in_checkpoints_and_exported_files(tmp_path: Path) -> None:
    changes = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "padding": "black"}
    for path in make(tmp_path, dataclasses.replace(CONFIG, **changes)):  # type: ignore[arg-type]
        data = loader_config(LoaderConfig("images"), open_cpu(path))
        assert {name: getattr(data, name) for name in changes} == changes, path


def test_floats_for_a_file_of_uint8_are_refused(paths: tuple[str, str]) -> None:
    with pytest.raises(OdtkError, match=r"model.onnx \(ONNX Runtime, CPU\) takes pixels as uint8, not torch.float32"):
        open_cpu(paths[1])(images().float())


def test_pixels_as_float32_give_the_same_detections(tmp_path: Path, paths: tuple[str, str]) -> None:
    pth, path = make(tmp_path, CONFIG, "float32")
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    backend = open_cpu(path)
    assert backend.input_type == "float32" and open_cpu(paths[1]).input_type == "uint8"
    assert_same(pth, path)
    found = [backend(images()), backend(images().float()), open_cpu(paths[1])(images())]
    assert all(torch.equal(found[0].scores, other.scores) for other in found)


def test_files_of_before_take_normalized_floats(tmp_path: Path, paths: tuple[str, str]) -> None:
    """Format 3: the graph starts with the network, and the metadata do not know of pixels."""
    source = checkpoint.load(paths[0])
    detector = checkpoint.build_detector(source).fold()
    config = ExportConfig("", "", size=(32, 48), precision="fp32", postprocess=LIMITS)
    graph = trace(detector, config.input_size)
    old = export.append_postprocess(graph, detector, export.metadata_of(detector, source, config, "detections"))
    values = json.loads(old.metadata_props[0].value) | {"format": 3}
    del values["input_type"]
    old.metadata_props[0].value = json.dumps(values)
    (tmp_path / "old.onnx").write_bytes(serialize(old))
    backend = open_cpu(str(tmp_path / "old.onnx"))
    assert backend.input_type == loader_config(LoaderConfig("images"), backend).input_type == "normalized"
    assert_same(paths[0], str(tmp_path / "old.onnx"))
    floats = normalize(images(), backend.mean, backend.std)
    assert torch.equal(backend(floats).scores, backend(images()).scores)


def test_what_loaders_give_a_checkpoint(tmp_path: Path, paths: tuple[str, str]) -> None:
    """Pixels where padding is a pixel; padding that is zero once normalized stays exactly that."""
    black = save(detector_of(dataclasses.replace(CONFIG, padding="black")), tmp_path)
    assert [open_cpu(path).input_type for path in (black, paths[0])] == ["uint8", "normalized"]
    backend = open_cpu(paths[0])
    assert torch.equal(backend(images()).scores, backend(normalize(images(), backend.mean, backend.std)).scores)


def test_files_of_before_pad_with_the_mean(paths: tuple[str, str]) -> None:
    assert [open_cpu(path).padding for path in paths] == ["mean", "mean"]
    metadata = open_cpu(paths[1]).metadata
    assert metadata is not None
    old = json.loads(metadata.to_json()) | {"format": 2}
    del old["padding"]
    assert Metadata.from_json(json.dumps(old), "m.onnx") == metadata
