"""What a user can set: per command one frozen dataclass whose fields are its flags, keys and keywords.

A field owns its default (taken from config.py where a stage of the pipeline has it already), its help text and its
check. The command line, a settings file and the Python API all call the class with the values that were given, so all
three accept the same, refuse the same, and mean the same. Standard library only.

None as a value means: no preference. What then holds is worked out from the other settings here (``resolved``), and
from the data and the machine in training/plan.py.

What lies where; a file imports only from files below its own:

    pretrain.py      pretrain
    train.py         train, plan: what their fields say together, what follows from what
    train_fields.py  the fields of train themselves
    infer.py         infer, benchmark
    export.py        export
    evaluate.py      evaluate, visualize, info
    data.py          check, convert, synth
    shared.py        fields and checks that several commands have
    defaults.py      defaults that depend on other settings; presets and variants
    base.py          Settings: flags over a file over a preset, each value checked; reading the file
    fields.py        kinds of values; the option that a field carries

Other rooms import from odtk.settings itself, never from a file in it, so every name has one place to come from.
"""

from .base import Settings
from .data import CheckSettings, ConvertSettings, SynthSettings
from .defaults import CALIBRATION_METHOD_OF_HEAD, CALIBRATION_METHODS, DENSE, PRESETS, VARIANTS
from .evaluate import EvaluateSettings, InfoSettings, VisualizeSettings
from .export import ExportSettings
from .fields import (
    ANGLE,
    DEVICES,
    DURATION,
    FRACTION,
    PART,
    SHARE,
    SIDE,
    SQUARE,
    SWITCH,
    TEXT,
    Option,
    flag,
    options,
    seconds_of,
)
from .infer import BenchmarkSettings, InferSettings
from .pretrain import PRETRAIN_BATCH, PRETRAIN_EPOCHS, PretrainSettings
from .train import LENGTH, PlanSettings, TrainSettings
from .train_fields import RESNET_OPTIONS

__all__ = [
    "ANGLE",
    "CALIBRATION_METHODS",
    "CALIBRATION_METHOD_OF_HEAD",
    "DENSE",
    "DEVICES",
    "DURATION",
    "FRACTION",
    "LENGTH",
    "PART",
    "PRESETS",
    "PRETRAIN_BATCH",
    "PRETRAIN_EPOCHS",
    "RESNET_OPTIONS",
    "SHARE",
    "SIDE",
    "SQUARE",
    "SWITCH",
    "TEXT",
    "VARIANTS",
    "BenchmarkSettings",
    "CheckSettings",
    "ConvertSettings",
    "EvaluateSettings",
    "ExportSettings",
    "InferSettings",
    "InfoSettings",
    "Option",
    "PlanSettings",
    "PretrainSettings",
    "Settings",
    "SynthSettings",
    "TrainSettings",
    "VisualizeSettings",
    "flag",
    "options",
    "seconds_of",
]
