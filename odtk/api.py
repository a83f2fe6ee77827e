"""The Python API: the commands as functions, whose keywords are the settings' names, and a model that predicts.

    import odtk
    odtk.train("model.pth", annotations="train.json", epochs=20)
    model = odtk.load("model.pth")
    for found in model.predict("images/", stream=True): ...

Every function raises odtk.OdtkError, one sentence, for what the caller can mend.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from . import commands
from .settings import EvaluateSettings, ExportSettings, InferSettings, TrainSettings

if TYPE_CHECKING:
    from .evaluation.evaluate import Metrics
    from .inference.predict import Model

Path = str | os.PathLike[str]


def load(model: Path, *, device: str | None = None, precision: str = "mixed", threshold: float = 0.05) -> Model:
    """A detector that is ready to run.

    Args:
        model: .pth, .onnx, .plan or .engine.
        device: cpu, cuda or cuda:N; None: the first GPU where there is one.
        precision: of a .pth: mixed (fp16 on a GPU, fp32 on a CPU), fp16, bf16 or fp32; other files have their own.
        threshold: detections score above this; not below what an exported file has baked in.
    """
    from .inference.predict import Model

    with commands.explaining():
        return Model.load(os.fspath(model), device=device, precision=precision, threshold=threshold)


def train(model: Path, **settings: Any) -> str:
    """`odtk train`: trains into ``model``, or resumes the run that is in it, and returns its path.

    Args:
        settings: settings.TrainSettings by name; ``annotations`` is required. None means: no preference.
    """
    with commands.explaining():
        return commands.train(TrainSettings.of({"model": model, **settings}))


def infer(model: Path, **settings: Any) -> list[dict[str, Any]] | None:
    """`odtk infer`: COCO results of every image, also written to ``output``; None where several processes ran.

    Args:
        settings: settings.InferSettings by name.
    """
    with commands.explaining():
        return commands.infer(InferSettings.of({"model": model, **settings}))


def export(model: Path, output: Path, **settings: Any) -> bool:
    """`odtk export`: writes the artifact; whether ``verify`` (if asked for) found it within the allowed drop.

    Args:
        settings: settings.ExportSettings by name.
    """
    with commands.explaining():
        return commands.export(ExportSettings.of({"model": model, "output": output, **settings}))


def evaluate(detections: Path, **settings: Any) -> Metrics:
    """`odtk evaluate`: prints and returns the COCO figures of a detections file.

    Args:
        settings: settings.EvaluateSettings by name; ``annotations`` is required.
    """
    with commands.explaining():
        return commands.evaluate(EvaluateSettings.of({"detections": detections, **settings}))
