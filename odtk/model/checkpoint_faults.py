"""What can be wrong with the content of a checkpoint file, which may be damaged or made by anybody.

Every function takes a part of that content, of any type, and returns its first fault as the end of a sentence that
begins with the file ("its classes are 'many'"), or None.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..config import ModelConfig, OdtkError
from ..text import plural
from .classifier import Classifier
from .detector import Detector

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
POSITIVE = ("ratios", "scales", "std")  # model settings by which something is divided, or whose logarithm is taken
MAX_DEPTH = 8  # lists within lists in the settings of a run
ENTRIES = ("model", "categories", "state_dict", "training")  # that every file of odtk has


def content_fault(content: Mapping[str, Any]) -> str | None:
    """Of a whole file of odtk, as checkpoint.save writes it."""
    for name in ENTRIES:
        if name not in content:
            return f"it lacks the entry {name!r}"
    return (
        model_values_fault(content["model"])
        or categories_fault(content["categories"], content["model"].get("classes", ModelConfig.classes))
        or training_fault(content["training"])
        or settings_fault(content.get("settings"))
        or versions_fault(content.get("versions"))
    )


def model_values_fault(values: Any) -> str | None:
    """Of ModelConfig as a dictionary: the type of every value, not yet whether a detector can be built from them."""
    if not is_dictionary(values):
        return "its model is not a dictionary of settings"
    hints = get_type_hints(ModelConfig)
    for name in (field.name for field in fields(ModelConfig) if field.name in values):
        value = values[name]
        if not fits(value, hints[name]):
            return f"the {name} of its model {'are' if name.endswith('s') else 'is'} {shown(value)}"
        if name in POSITIVE and not all(number > 0 for number in value):
            return f"the {name} of its model are {shown(value)}, and must be positive"
    return None


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type as dataclasses state it; lists may stand for tuples, whole numbers for floats.

    Numbers must be finite, whole numbers must fit into 32 bits.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if hint is float:
        return is_number(value)
    if hint is int:
        return type(value) is int and abs(value) < 2**31
    return type(value) is hint


def categories_fault(pairs: Any, classes: int) -> str | None:
    """Of [[id, name], …], or None where the file does not say."""
    if pairs is None:
        return None
    if not isinstance(pairs, (list, tuple)):
        return "its categories are not a list"
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return f"its category {shown(pair)} is not an id and a name"
        if type(pair[0]) is not int or abs(pair[0]) >= 2**63 or not isinstance(pair[1], str):
            return f"its category {shown(pair)} is not a whole number and a name"
    if len({id for id, _ in pairs}) < len(pairs):
        return "two of its categories have the same id"
    if len(pairs) != classes:
        return f"it has {plural(len(pairs), 'category', 'categories')} for {plural(classes, 'class', 'classes')}"
    return None


def training_fault(training: Any) -> str | None:
    """Of a run, as far as others than a resumed run read it (training/run.py checks the rest); None: there is none."""
    if training is None:
        return None
    if not is_dictionary(training):
        return "its training run is not a dictionary"
    if "iteration" in training and not (type(training["iteration"]) is int and 0 <= training["iteration"] < 2**31):
        return f"the iteration of its training run is {shown(training['iteration'])}"
    if "best" in training and not is_number(training["best"]):
        return f"the best AP of its training run is {shown(training['best'])}"
    return None


def settings_fault(settings: Any) -> str | None:
    """Of the settings of a run: what is read from them here, and whether JSON can hold the rest."""
    if settings is None:
        return None
    if not is_dictionary(settings) or not is_plain(settings):
        return "its settings are not a dictionary of plain values"
    for name, hint in (
        ("input_size", tuple[int, int] | None),
        ("resize", int | None),
        ("max_size", int | None),
        ("given", tuple[str, ...] | None),
        ("padding_share", float | None),
        ("aspects", tuple[float, ...] | None),
    ):
        value = settings.get(name)
        whole = [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)]
        if not fits(value, hint) or any(not 0 < number < 2**20 for number in whole):
            return f"its setting {name} is {shown(value)}"
    if not 0 <= (settings.get("padding_share") or 0) <= 1:
        return f"its setting padding_share is {shown(settings['padding_share'])}"
    if not all(aspect > 0 for aspect in settings.get("aspects") or ()):
        return f"its setting aspects is {shown(settings['aspects'])}"
    return None


def versions_fault(versions: Any) -> str | None:
    """Of the versions that wrote the file."""
    if versions is None or (is_dictionary(versions) and all(isinstance(v, str) for v in versions.values())):
        return None
    return "its versions are not a dictionary of texts"


def weights_fault(model: ModelConfig, state_dict: Any, kind: str = "detector") -> str | None:
    """Of the weights of a detector with these settings (or a classifier), without making memory for it."""
    if not is_dictionary(state_dict):
        return "its weights are not a dictionary"
    for name, tensor in state_dict.items():
        if not is_weights(tensor):
            return f"its {shown(name)} is not a tensor of weights"
    try:
        own = tensors_of(model, kind)
    except OdtkError as error:
        return f"its model cannot be built: {str(error).rstrip('.')}"
    return mismatch(own, state_dict) or values_fault(state_dict)


def tensors_of(model: ModelConfig, kind: str = "detector") -> dict[str, Tensor]:
    """The parameters and buffers of a detector with these settings (or a classifier) by name, on the meta device.

    Raises:
        OdtkError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return (Classifier if kind == "classifier" else Detector)(model).state_dict()
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise OdtkError("Its tensors would be of impossible sizes.") from error


def is_weights(value: Any) -> bool:
    """Whether a value is a tensor as weights are: dense, on the CPU, of real numbers (or whole ones, as counters)."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.dtype in (*FLOATS, torch.int64)


def mismatch(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str | None:
    """The first name that only one of them has, the first shape or kind of number that differs."""
    for name in [*own, *state_dict]:
        if name not in state_dict:
            return f"it belongs to another model: it lacks {name}"
        if name not in own:
            return f"it belongs to another model: it has {name}, which this model lacks"
        theirs, ours = state_dict[name], own[name]
        if ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)}, not {tuple(ours.shape)}"
            return f"it belongs to another model: {name} has shape {shapes}"
        if ours.is_floating_point() != theirs.is_floating_point():
            return f"it has {'whole' if ours.is_floating_point() else 'real'} numbers in {name}"
    return None


def values_fault(state_dict: Mapping[str, Tensor]) -> str | None:
    """Of the numbers themselves: a detector with one of these gives no detections, or wrong ones, without an error."""
    for name, tensor in state_dict.items():
        if not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "infinite"
            return f"its weights {name} are not finite ({kind}): go back to an older checkpoint"
        if name.endswith("running_var") and (tensor < 0).any():
            return f"its variances {name} are negative: go back to an older checkpoint"
    return None


def odtk_02_fault(content: Mapping[str, Any]) -> str | None:
    """Of a file of ODTK 0.2, whose entries backbone, classes and state_dict are there: the types of what is read."""
    backbones = content["backbone"]
    if not fits([backbones] if isinstance(backbones, str) else backbones, tuple[str, ...]):
        return f"its backbone is {shown(backbones)}"
    if not fits(content["classes"], int) or content["classes"] < 1:
        return f"its number of classes is {shown(content['classes'])}"
    for name in ("ratios", "scales", "angles"):
        values = content.get(name) or ()
        if not fits(values, tuple[float, ...]) or (name in POSITIVE and not all(value > 0 for value in values)):
            return f"the {name} of its anchors are {shown(values)}"
    return None if is_dictionary(content["state_dict"]) else "its weights are not a dictionary"


def is_dictionary(value: Any) -> bool:
    """Whether a value is a dictionary whose keys are texts."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether JSON can hold a value. A pickle may hold a list that contains itself, which is too deep."""
    if isinstance(value, (list, tuple)):
        return depth < MAX_DEPTH and all(is_plain(one, depth + 1) for one in value)
    if isinstance(value, dict):
        return depth < MAX_DEPTH and is_dictionary(value) and all(is_plain(v, depth + 1) for v in value.values())
    return value is None or isinstance(value, (str, bool)) or is_number(value)


def shown(value: Any) -> str:
    """A value for a sentence; of one that is not plain, its type."""
    text = repr(value) if is_plain(value) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}…"
