"""What `odtk info` says of this machine."""

import importlib
import json
from importlib import metadata
from pathlib import Path

import torch

from odtk import describe
from odtk.model.weights import packaged_files


def test_what_is_said_of_the_machine(capsys) -> None:
    found = describe.environment()
    assert found["versions"]["torch"] == metadata.version("torch")  # not torch.__version__: it may name a CUDA
    assert found["abilities"]["train, infer, export to ONNX"] is True
    if not torch.cuda.is_available():
        assert "GPU" in str(found["abilities"]["TensorRT engines (.plan)"])
    for state in found["abilities"].values():
        assert state is True or len(str(state)) > 10  # no "no" without what to do
    describe.print_environment(found)
    shown = capsys.readouterr().out
    assert "torch" in shown and "DALI loader" in shown
    json.dumps(found)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr("odtk.describe.has_module", lambda name: False)
    monkeypatch.setattr("odtk.kernels.extension", None)
    abilities = describe.abilities()
    assert "pip install 'odtk[cuda13]'" in str(abilities["DALI loader"])
    assert "pip install 'odtk[report]'" in str(abilities["training curves"])
    assert "not built" in str(abilities["compiled kernels (odtk._C)"])


def test_a_folder_of_a_packages_name_is_not_the_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "AVideoCodec").mkdir()
    (tmp_path / "notes_model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not describe.has_module("AVideoCodec")
    assert packaged_files("notes-model") == []
    (tmp_path / "AVideoCodec" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert describe.has_module("AVideoCodec")
