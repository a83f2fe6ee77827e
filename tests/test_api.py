"""The Python API: a light import, commands as functions, one sentence for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import odtk
from odtk.config import ModelConfig, OdtkError
from odtk.settings import InferSettings
from tests.random_models import detector_of, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2), bias=0.0), tmp_path_factory.mktemp("m"))


def test_importing_odtk_imports_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import odtk; odtk.__version__; dir(odtk)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "foreign = new - set(sys.stdlib_module_names) - {'odtk'}\n"
        "assert not foreign, foreign\n"
        "modules = [name for name in sys.modules if name.startswith('odtk.')]\n"
        "assert not modules, modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchs_compiler_is_not_imported_before_it_is_asked_for() -> None:
    """It takes as long to import as all of torch beside it."""
    code = (
        "import sys; import odtk.training.train, odtk.inference.infer, odtk.inference.backends\n"
        "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_has_a_home() -> None:
    functions = {"benchmark", "check", "convert", "evaluate", "export", "infer", "info", "load", "synth", "train"}
    functions |= {"plan", "pretrain", "visualize"}
    assert {"Detections", "Model", "OdtkError"} | functions == set(odtk.__all__)
    for name in odtk.__all__:
        assert callable(getattr(odtk, name)) and name in dir(odtk)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        odtk.lod  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(odtk.__file__).parent / "py.typed").is_file()
    text = (Path(odtk.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'odtk = ["py.typed"' in text  # a wheel holds it


def test_an_unknown_keyword_is_offered_the_nearest_setting(model: str) -> None:
    with pytest.raises(OdtkError, match="There is no setting 'treshold'|no setting 'score_treshold'"):
        odtk.infer(model, score_treshold=0.5)
    with pytest.raises(OdtkError, match="did you mean 'iters'"):
        odtk.train("m.pth", annotations="a.json", iter=5)


def test_info_returns_what_it_prints(model: str, capsys) -> None:
    found = odtk.info(model, json=True)
    assert found["file"] == model and json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert odtk.info()["versions"]["odtk"] == odtk.__version__


def test_a_path_stands_for_a_list_of_one() -> None:
    settings = InferSettings.of({"model": Path("m.pth"), "images": Path("a"), "output": Path("o.json")})
    assert (settings.model, settings.images, settings.output) == ("m.pth", ("a",), ("o.json",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "tpu"}, "device: 'tpu' is not cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device: 'meta' is not"),
        ({"precision": "fp8"}, "precision: 'fp8' is not one of mixed, fp16, bf16, fp32"),
        ({"threshold": 2}, "^threshold: 2 is not a number from 0 to 1"),
        ({"size": (0, 4)}, "--size: 0 is not a positive whole number"),
        ({"loader": "pil"}, "--loader: 'pil' is not one of dali, torch"),
    ],
)
def test_load_refuses_what_it_cannot_do(model: str, settings: dict, words: str) -> None:
    with pytest.raises(OdtkError, match=words):
        odtk.load(model, **settings)


def test_load_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="There is no model .*m.pth"):
        odtk.load(tmp_path / "m.pth")
    (tmp_path / "m.txt").write_text("")
    with pytest.raises(OdtkError, match="must end in .pth, .onnx, .plan or .engine"):
        odtk.load(tmp_path / "m.txt")


def test_the_threshold_is_applied_and_nothing_is_printed(model: str, coco: Path, capfd) -> None:
    low, high = (odtk.load(model, resize=48, max_size=64, threshold=t).predict(coco / "1.jpg") for t in (0.05, 0.6))
    assert 0 < len(high) < len(low) and high.scores.min() > 0.6 > low.scores.min()
    assert odtk.load(model, size=(48, 64)).data.size == (48, 64)
    assert capfd.readouterr().out == ""


def test_commands_on_a_dataset_are_functions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    odtk.synth(data, images=5, size=64, classes=2)
    assert "Drew 5 images of 64×64 pixels" in capsys.readouterr().out
    annotations = data / "train.json"
    assert odtk.check(annotations, images=data / "train", resize=64) is True
    assert "0 faults would stop training" in capsys.readouterr().out
    next((data / "train").iterdir()).unlink()
    assert odtk.check(annotations=annotations, images=data / "train") is False
    odtk.convert(data / "val.json", tmp_path / "voc", to="voc", images=data / "val", lossy=True)
    assert list((tmp_path / "voc").rglob("*.xml"))
    drawn = odtk.visualize(annotations=data / "val.json", images=data / "val", output=tmp_path / "pictures", count=1)
    assert len(drawn) == 1 and Path(drawn[0]).is_file()


def test_benchmark_is_a_function(model: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    odtk.benchmark(model, size=64, iters=1, warmup=0, devices="cpu", output=figures)
    assert figures.is_file()


def test_a_setting_that_is_given_twice_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="^model is given twice: 'a' and 'x'; keep one"):
        odtk.train("a", model="x", annotations="a.json")
    with pytest.raises(OdtkError, match="^output is given twice"):
        odtk.export("a.pth", Path("b.onnx"), output="c.onnx")
    with pytest.raises(OdtkError, match="MODEL.pth is required"):
        odtk.train(annotations="a.json")
    with pytest.raises(OdtkError, match="--to .* is required"):
        odtk.convert("a.json", "b")
