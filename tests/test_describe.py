"""What `odtk info` says of this machine."""

import json
from importlib import metadata

import torch

from odtk import describe


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
