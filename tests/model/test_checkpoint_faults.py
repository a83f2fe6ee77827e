"""Checkpoints with anything in them are refused in one sentence that names the file and what is wrong."""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from odtk.cli import main
from odtk.config import ModelConfig, OdtkError, to_dict
from odtk.model import checkpoint as files
from odtk.model.checkpoint_faults import tensors_of
from odtk.model.weights import read_weights

MODEL = ModelConfig(backbones=("ResNet18C4",), classes=2)
WEIGHT = "backbones.ResNet18C4.conv1.weight"
BIAS = "head.cls_head.8.bias"
Change = Callable[[dict[str, Any]], object]


def one_number(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape that is a single number in memory and in a file."""
    return torch.ones((), dtype=dtype).expand(shape)


def whole_content() -> dict[str, Any]:
    """What a file of odtk holds, in a few kilobytes."""
    return {
        "format": "odtk",
        "version": 1,
        "model": to_dict(MODEL),
        "categories": [[3, "red"], [7, "green"]],
        "state_dict": {name: one_number(t.shape, t.dtype) for name, t in tensors_of(MODEL).items()},
        "training": {"iteration": 5, "best": 0.25},
        "settings": {"input_size": [64, 64], "resize": 64, "max_size": 64, "given": ["resize"]},
        "versions": {"odtk": "0.3.0", "torch": "2.0"},
    }


def old_content() -> dict[str, Any]:
    """What a file of ODTK 0.2 holds."""
    weights = {name.removeprefix("head."): t for name, t in whole_content()["state_dict"].items()}
    return {"backbone": ["ResNet18C4"], "classes": 2, "state_dict": weights, "ratios": [1.0, 2.0, 0.5]}


def put(value: Any, *keys: str) -> Change:
    """Puts a value somewhere into the content."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def drop(*keys: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def filled(value: float, shape: tuple[int, ...] = (64, 3, 7, 7)) -> Tensor:
    tensor = torch.ones(shape)
    tensor.view(-1)[3] = value
    return tensor


NESTED: list[Any] = []
NESTED.append(NESTED)
JUNK: list[Any] = ["many", None, -1, 0, 10**400, math.nan, [1], {"a": 1}, True, torch.ones(3), b"x"]
CHANGES: dict[str, tuple[Change, str]] = {
    "no version": (drop("version"), "version of its format"),
    "version text": (put("1", "version"), "version of its format"),
    "no model": (drop("model"), "lacks the entry 'model'"),
    "no categories": (drop("categories"), "lacks the entry 'categories'"),
    "no weights": (drop("state_dict"), "lacks the entry 'state_dict'"),
    "no training": (drop("training"), "lacks the entry 'training'"),
    "model list": (put([1], "model"), "its model is not a dictionary"),
    "model key": (put({1: 2}, "model"), "its model is not a dictionary"),
    "backbone number": (put([1], "model", "backbones"), r"the backbones of its model are \[1\]"),
    "backbone text": (put("ResNet18C4", "model", "backbones"), "the backbones of its model are 'ResNet18C4'"),
    "backbone unknown": (put(["AlexNet"], "model", "backbones"), "The backbone 'AlexNet' does not exist"),
    "backbone twice": (put(["ResNet18C4"] * 2, "model", "backbones"), "each of them only once"),
    "no backbone": (put([], "model", "backbones"), "one or more backbones"),
    "head": (put("yolo", "model", "head"), "its model cannot be built"),
    "norm": (put("layer", "model", "norm"), "its model cannot be built"),
    "classes huge": (put(2**31 - 1, "model", "classes"), "2 categories for 2147483647 classes"),
    "classes float": (put(2.0, "model", "classes"), "the classes of its model are 2.0"),
    "ratio 0": (put([1.0, 0.0, 2.0], "model", "ratios"), "must be positive"),
    "scale NaN": (put([1.0, math.nan, 2.0], "model", "scales"), "the scales of its model are a list"),
    "angle text": (put(["x"], "model", "angles"), r"the angles of its model are \['x'\]"),
    "switch": (put(1, "model", "norm_eval"), "the norm_eval of its model is 1"),
    "dcn": (put([9], "model", "dcn"), "its model cannot be built: --dcn takes"),
    "freeze_at": (put(-1, "model", "freeze_at"), "--freeze-at takes"),
    "newer setting": (put(1, "model", "warp"), "The setting warp is unknown to this version"),
    "categories text": (put("ab", "categories"), "its categories are not a list"),
    "category number": (put([1, 2], "categories"), "its category 1 is not"),
    "category triple": (put([[1, "a", 2], [2, "b"]], "categories"), "is not an id and a name"),
    "category id": (put([["1", "a"], [2, "b"]], "categories"), "is not a whole number and a name"),
    "category huge": (put([[2**70, "a"], [2, "b"]], "categories"), "is not a whole number and a name"),
    "category name": (put([[1, None], [2, "b"]], "categories"), "is not a whole number and a name"),
    "category twice": (put([[1, "a"], [1, "b"]], "categories"), "the same id"),
    "category missing": (put([[1, "a"]], "categories"), "1 category for 2 classes"),
    "weights list": (put([torch.ones(1)], "state_dict"), "its weights are not a dictionary"),
    "weights key": (put({1: torch.ones(1)}, "state_dict"), "its weights are not a dictionary"),
    "weight missing": (drop("state_dict", WEIGHT), f"it lacks {WEIGHT}"),
    "weight more": (put(torch.ones(1), "state_dict", "extra"), "it has extra, which"),
    "weight number": (put(1.0, "state_dict", WEIGHT), f"its '{WEIGHT}' is not a tensor"),
    "weight shape": (put(torch.ones(3, 3), "state_dict", WEIGHT), rf"{WEIGHT} has shape \(3, 3\), not"),
    "weight whole": (put(torch.ones(64, 3, 7, 7).long(), "state_dict", WEIGHT), f"whole numbers in {WEIGHT}"),
    "weight complex": (put(torch.ones(64, 3, 7, 7) * 1j, "state_dict", WEIGHT), "is not a tensor of weights"),
    "weight bool": (put(torch.ones(64, 3, 7, 7).bool(), "state_dict", WEIGHT), "is not a tensor of weights"),
    "weight sparse": (put(torch.ones(64, 3, 7, 7).to_sparse(), "state_dict", WEIGHT), "is not a tensor of weights"),
    "weight meta": (put(torch.ones(64, 3, 7, 7, device="meta"), "state_dict", WEIGHT), "is not a tensor of weights"),
    "weight NaN": (put(filled(math.nan), "state_dict", WEIGHT), rf"its weights {WEIGHT} are not finite \(NaN\)"),
    "weight inf": (put(filled(-math.inf), "state_dict", WEIGHT), rf"{WEIGHT} are not finite \(infinite\)"),
    "bias NaN": (put(filled(math.nan, (18,)), "state_dict", BIAS), rf"{BIAS} are not finite \(NaN\)"),
    "variance": (
        put(filled(-1, (64,)), "state_dict", "backbones.ResNet18C4.bn1.running_var"),
        "variances backbones.ResNet18C4.bn1.running_var are negative",
    ),
    "training list": (put([1], "training"), "its training run is not a dictionary"),
    "training key": (put({1: 2}, "training"), "its training run is not a dictionary"),
    "iteration": (put("5", "training", "iteration"), "the iteration of its training run is '5'"),
    "best": (put(math.nan, "training", "best"), "the best AP of its training run is a float"),
    "settings list": (put([1], "settings"), "its settings are not"),
    "settings tensor": (put(torch.ones(1), "settings", "lr"), "its settings are not"),
    "settings nested": (put(NESTED, "settings", "lr"), "its settings are not"),
    "share": (put(1.5, "settings", "padding_share"), "its setting padding_share is 1.5"),
    "shapes": (put([1.0, 0.0], "settings", "aspects"), "its setting aspects is"),
    "size text": (put(["a", "b"], "settings", "input_size"), "its setting input_size is"),
    "size short": (put([64], "settings", "input_size"), "its setting input_size is"),
    "size 0": (put([0, 64], "settings", "input_size"), "its setting input_size is"),
    "size huge": (put([2**30, 64], "settings", "input_size"), "its setting input_size is"),
    "resize": (put(-5, "settings", "resize"), "its setting resize is -5"),
    "given": (put(5, "settings", "given"), "its setting given is 5"),
    "versions": (put({"odtk": 1}, "versions"), "its versions are not"),
}


def test_the_content_before_a_change_is_loaded(tmp_path: Path) -> None:
    torch.save(whole_content(), tmp_path / "m.pth")
    assert files.load(tmp_path / "m.pth").model == MODEL
    torch.save(old_content(), tmp_path / "old.pth")
    assert files.load(tmp_path / "old.pth").model.norm == "frozen"


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES.keys())
def test_a_fault_is_named(change: Change, message: str, tmp_path: Path) -> None:
    content = whole_content()
    change(content)
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(OdtkError, match=message) as error:
        files.load(tmp_path / "m.pth")
    assert "\n" not in str(error.value) and ("m.pth" in str(error.value) or "warp" in str(error.value))


def places(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every entry of the content, entries of entries included, but of the weights only two."""
    found: list[tuple[str, ...]] = []
    for name, value in content.items():
        found.append((name,))
        if isinstance(value, dict):
            found += [(name, inner) for inner in value if name != "state_dict" or inner.endswith(BIAS)]
    return found


@pytest.mark.parametrize("make", [whole_content, old_content])
def test_junk_in_any_place_is_accepted_or_refused(make: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    """Never anything but an OdtkError; and what is accepted can be built, and described."""
    refusals, generator = 0, random.Random(0)
    for keys in places(make()):
        for junk in generator.sample(JUNK, 5):
            content = make()
            put(junk, *keys)(content)
            torch.save(content, tmp_path / "m.pth")
            try:
                loaded = files.load(tmp_path / "m.pth")
            except OdtkError:
                refusals += 1
                continue
            assert files.trained_size(loaded) in (None, (64, 64))
            json.dumps(loaded.settings)
            assert all(isinstance(tensor, Tensor) for tensor in loaded.state_dict.values()), keys
    assert refusals > 2.5 * len(places(make()))


def test_files_with_damaged_bytes(tmp_path: Path) -> None:
    """Cut anywhere, or with some bytes changed: loaded, or refused."""
    torch.save(whole_content(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    generator = random.Random(0)
    path = tmp_path / "m.pth"
    refusals = 0
    for case in range(600):
        content = bytearray(whole)
        if case % 3 == 0:
            del content[generator.randrange(len(content)) :]
        for _ in range(case % 3 * 8):
            # Half of them in the pickle, which is at the start of the archive, half anywhere.
            content[generator.randrange(min(len(content), 20_000 if case % 2 else len(content)))] = generator.randrange(
                256
            )
        path.write_bytes(content)
        try:
            files.load(path)
        except OdtkError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 400


def test_a_model_of_enormous_sizes_takes_no_memory(tmp_path: Path) -> None:
    content = whole_content() | {"categories": None}
    content["model"] |= {"classes": 2**31 - 1, "ratios": [1.0] * 1000, "scales": [1.0] * 1000}
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(OdtkError, match="its model cannot be built|belongs to another model"):
        files.load(tmp_path / "m.pth")


@pytest.mark.parametrize("command", [["infer"], ["export", "m.onnx"]], ids=["infer", "export"])
def test_no_command_uses_weights_that_are_not_finite(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """They would give no detections, and exit code 0."""
    monkeypatch.chdir(tmp_path)
    content = whole_content()
    put(filled(math.nan), "state_dict", WEIGHT)(content)
    torch.save(content, "m.pth")
    Image.new("RGB", (64, 64)).save("1.png")
    images = ["--images", "."] if command[0] == "infer" else []
    assert main([command[0], "m.pth", *command[1:], *images]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"odtk: m.pth cannot be used: its weights {WEIGHT} are not finite (NaN)" in said
    assert sorted(os.listdir()) == ["1.png", "m.pth"]


def test_files_of_backbone_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    good = torch.ones(2)
    for content in ({"module.a": good, 1: good, "b": "x", "c": good.to_sparse()}, {"state_dict": {"a": good}}):
        torch.save(content, path)
        assert list(read_weights(str(path))) == ["a"]
    torch.save({"state_dict": [1]}, path)
    assert read_weights(str(path)) == {}
    torch.save({"a": torch.tensor([math.inf])}, path)
    with pytest.raises(OdtkError, match=r"weights\.pth cannot be used: its weights a are not finite"):
        read_weights(str(path))
