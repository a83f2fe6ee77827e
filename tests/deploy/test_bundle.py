"""The folder of `odtk export --bundle`: what is in it, what runs it, and what is said when it is not as written."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

import odtk
from odtk import describe
from odtk.cli import build_parser, main, settings_of
from odtk.commands import command_of
from odtk.config import ModelConfig, OdtkError
from odtk.deploy import manifest
from odtk.deploy.bundle import metadata_of, write_settings
from odtk.model.checkpoint import load
from odtk.settings import ExportSettings, TrainSettings
from tests.random_models import detector_of, save

NAMES = ("red; round cell", "two\nlines")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_the_folder_is_complete_and_every_file_has_its_hash(bundle: Path) -> None:
    written = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert written >= {
        "manifest.json",
        "model.onnx",
        "labels.txt",
        "model_card.md",
        "export.yaml",
        "deepstream/config_infer.txt",
    }
    found = manifest.read_manifest(str(bundle))
    assert found["files"].keys() == written - {"manifest.json"} and found["schema"] == 1
    assert found["metadata"] == json.loads(metadata_of(str(bundle / "model.onnx")).to_json())
    assert [manifest.fault(str(bundle), name, found) for name in found["files"]] == [None] * len(found["files"])
    # One line a class, whatever a name holds: the line is what a server shows for the class index.
    assert (bundle / "labels.txt").read_text().splitlines() == ["red, round cell", "two\\nlines"]
    card = (bundle / "model_card.md").read_text()
    assert "uint8 [N, 3, 64, 64]" in card and "Nothing was measured" in card and "--full-precision" in card


def test_the_settings_of_the_export_write_it_again(bundle: Path, tmp_path: Path) -> None:
    again = ExportSettings.of({"settings": bundle / "export.yaml", "output": tmp_path / "again"})
    assert (again.bundle, again.size, again.full_precision) == (True, (64, 64), True)
    odtk.export(settings=bundle / "export.yaml", output=tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


def test_the_settings_of_the_training_train_again(bundle: Path, tmp_path: Path, coco: Path) -> None:
    path = tmp_path / "model.pth"
    odtk.train(
        path,
        annotations=coco / "truth.json",
        images=coco,
        backbone=["ResNet18C4"],
        backbone_weights="none",
        resize=64,
        max_size=64,
        iters=1,
        batch=2,
        devices="cpu",
        override=True,
    )
    checkpoint = load(str(path))
    assert checkpoint.settings is not None and {"given", "planned", "held_out", "data"} <= checkpoint.settings.keys()
    exported = ExportSettings(model=str(path), output="out", bundle=True)
    write_settings(str(tmp_path), checkpoint, exported, metadata_of(str(bundle / "model.onnx")))
    again = TrainSettings.of({"settings": tmp_path / "train.yaml"})
    assert (again.model, again.iters, again.batch, again.override) == (str(path), 1, 2, False)


def test_a_bundle_is_used_as_a_model(bundle: Path, coco: Path, tmp_path: Path) -> None:
    def detections(model: Path) -> str:
        output = tmp_path / f"{model.name}.json"
        assert main(["infer", str(model), "--images", str(coco), "--output", str(output), "--devices", "cpu"]) == 0
        return output.read_text()

    assert detections(bundle) == detections(bundle / "model.onnx") and len(json.loads(detections(bundle))) > 5
    image = next(coco.glob("*.jpg"))
    folder, file = (odtk.load(path, device="cpu").predict(image) for path in (bundle, bundle / "model.onnx"))
    assert (folder.scores == file.scores).all() and len(folder.scores)
    odtk.benchmark(bundle, devices="cpu", iters=1, warmup=0, output=tmp_path / "times.json")
    assert json.loads((tmp_path / "times.json").read_text())


def test_a_file_that_is_not_as_written_is_named(copy: Path, capsys) -> None:
    with open(copy / "model.onnx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(OdtkError, match=r"model\.onnx is changed"):
        manifest.artifact(str(copy), gpu=False)
    assert main(["infer", str(copy), "--images", str(copy)]) == 1
    assert "model.onnx is changed" in capsys.readouterr().err
    (copy / "model.onnx").unlink()
    with pytest.raises(OdtkError, match=r"model\.onnx is missing"):
        odtk.load(copy)


def test_info_shows_the_state_of_every_file(copy: Path, capsys) -> None:
    assert main(["info", str(copy)]) == 0
    assert "changed" not in (said := capsys.readouterr()).out and not said.err
    (copy / "labels.txt").write_text("other\n")
    (copy / "export.yaml").unlink()
    found = describe.describe_file(str(copy))
    assert found["files"]["labels.txt"].startswith("changed") and found["files"]["export.yaml"].startswith("missing")
    assert found["files"]["model.onnx"].startswith("as written") and found["model"]["size"] == [64, 64]
    assert main(["info", str(copy)]) == 1
    said = capsys.readouterr()
    assert "triton/client.py" in said.out
    assert said.err.count("\n") == 1 and "export.yaml is missing, labels.txt is changed" in said.err


def test_info_shows_every_state_where_the_model_is_not_whole(copy: Path, capsys) -> None:
    with open(copy / "model.onnx", "ab") as file:
        file.write(b"\0")
    assert main(["info", str(copy), "--json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["files"]["model.onnx"].startswith("changed") and found["files"]["labels.txt"].startswith("as written")
    assert found["model"] is None and "model.onnx is changed" in said.err


def test_info_shows_every_state_where_the_model_is_unusable_or_not_listed(copy: Path, capsys) -> None:
    (copy / "model.onnx").write_bytes(b"no model")
    metadata = metadata_of(str(copy / "deepstream" / "model.onnx"))
    (copy / "manifest.json").unlink()
    manifest.finish(str(copy), "now", metadata)
    assert main(["info", str(copy)]) == 1
    said = capsys.readouterr()
    assert "labels.txt" in said.out and "model.onnx is unusable" in said.err
    (copy / "model.onnx").unlink()
    (copy / "manifest.json").unlink()
    manifest.finish(str(copy), "now", metadata)
    assert main(["info", str(copy)]) == 1
    said = capsys.readouterr()
    assert "labels.txt" in said.out and "model.onnx is not in manifest.json" in said.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "whose export did not end"),
        ("{", "not valid JSON"),
        ("[]", "not the manifest"),
        ('{"kind": "odtk bundle", "schema": 99, "odtk": "9", "files": {}}', "newer odtk"),
        ('{"kind": "odtk bundle", "schema": 1, "files": {"../x": {"sha256": ""}}}', "damaged"),
        ('{"kind": "odtk bundle", "schema": 1, "files": {}}', "has no model.onnx"),
        ('{"kind": "odtk bundle", "schema": -3, "files": {}}', "not the manifest"),
        ('{"kind": "odtk bundle", "schema": true, "files": {}}', "not the manifest"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_one_sentence(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(OdtkError, match=words):
        manifest.artifact(str(tmp_path), gpu=False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labels.txt", {"bytes": "many"}),
        ("labels.txt", {"bytes": None}),
        ("labels.txt", {"bytes": True}),
        ("labels.txt", {"bytes": -1}),
        ("labels.txt", {"what": ["names"]}),
        ("x" * 5000, {}),
    ],
)
def test_a_damaged_entry_is_one_short_sentence(name: str, change: dict, copy: Path, capsys) -> None:
    found = json.loads((copy / "manifest.json").read_text())
    found["files"][name] = found["files"]["labels.txt"] | change
    (copy / "manifest.json").write_text(json.dumps(found))
    assert main(["info", str(copy)]) == 1
    said = capsys.readouterr().err
    assert "is damaged (files)" in said and len(said) < 500


def test_a_file_whose_name_no_file_system_takes_is_unreadable(copy: Path, capsys) -> None:
    found = json.loads((copy / "manifest.json").read_text())
    found["files"]["é" * 200] = found["files"]["labels.txt"]  # 400 bytes
    (copy / "manifest.json").write_text(json.dumps(found))
    assert main(["info", str(copy)]) == 1
    assert "é is unreadable" in capsys.readouterr().err


def test_an_engine_is_used_where_a_gpu_is_and_needs_its_plugins(copy: Path) -> None:
    for name in ("model.plan", "libodtk_plugins.so"):
        (copy / name).write_bytes(name.encode())
    (copy / "manifest.json").unlink()
    manifest.finish(str(copy), "now", metadata_of(str(copy / "model.onnx")))
    assert manifest.artifact(str(copy), gpu=True).endswith("model.plan")
    assert manifest.artifact(str(copy), gpu=False).endswith("model.onnx")
    (copy / "libodtk_plugins.so").unlink()
    with pytest.raises(OdtkError, match=r"libodtk_plugins\.so is missing"):
        manifest.artifact(str(copy), gpu=True)


def test_nothing_of_the_users_is_touched_and_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    model = save(detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2)), tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    with pytest.raises(OdtkError, match="is not empty"):
        odtk.export(model, own, bundle=True)
    assert [path.name for path in own.iterdir()] == ["notes.txt"]
    with pytest.raises(OdtkError, match="no calibration table"):
        odtk.export(model, tmp_path / "new", bundle=True, int8=True, calibration_table=tmp_path / "none.json")
    assert not (tmp_path / "new").exists()


def test_the_command_in_the_card_gives_the_same_settings() -> None:
    given = {"model": "a b.pth", "output": "out", "bundle": True, "size": (64, 96), "max_ap_drop": 0.5}
    words = shlex.split(command_of("export", ExportSettings.of(given)))
    assert words[:2] == ["odtk", "export"]
    assert settings_of(build_parser().parse_args(words[1:])) == ExportSettings.of(given)


def test_folder_and_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="--bundle writes a folder"):
        ExportSettings(model="m.pth", output="out.onnx", bundle=True)
    with pytest.raises(OdtkError, match="a folder needs --bundle"):
        ExportSettings(model="m.pth", output="out")


@pytest.mark.slow
def test_what_was_measured_is_in_the_card(tmp_path: Path, coco: Path, bundle: Path) -> None:
    path = str(bundle.parent / "model.pth")
    truth = json.loads((coco / "truth.json").read_text())
    truth["categories"] = [{"id": 3, "name": NAMES[0]}, {"id": 8, "name": NAMES[1]}]
    (coco / "truth.json").write_text(json.dumps(truth))
    odtk.export(
        path,
        tmp_path / "out",
        bundle=True,
        size=(64, 64),
        full_precision=True,
        devices="cpu",
        verify=True,
        annotations=coco / "truth.json",
        images=coco,
    )
    card = (tmp_path / "out" / "model_card.md").read_text()
    report = json.loads((tmp_path / "out" / "model.onnx.verify.json").read_text())
    assert f"| model.onnx | ONNX fp32 | {report['runs'][-1]['stats']['AP']:.4f} |" in card
    assert "model.onnx.verify.json" in manifest.read_manifest(str(tmp_path / "out"))["files"]
