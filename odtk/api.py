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


def load(
    model: Path,
    *,
    device: str | None = None,
    precision: str = "mixed",
    threshold: float | None = None,
    size: tuple[int, int] | None = None,
    resize: int | None = None,
    max_size: int | None = None,
    loader: str = InferSettings.loader,
) -> Model:
    """A detector that is ready to run.

    Args:
        model: .pth, .onnx, .plan or .engine.
        device: cpu, cuda or cuda:N; None: the first GPU where there is one.
        precision: of a .pth: mixed (fp16 on a GPU, fp32 on a CPU), fp16, bf16 or fp32; other files have their own.
        threshold: detections score above this; not below what is fixed in an exported file. None: 0.05, or what is
            fixed in the file.
        size, resize, max_size, loader: as the flags of `odtk infer`; None: the size that the model was trained or
            exported for.
    """
    settings = InferSettings.of(
        {
            "model": model,
            "score_threshold": threshold,
            "size": size,
            "resize": resize,
            "max_size": max_size,
            "loader": loader,
        }
    )
    with commands.explaining():
        return commands.load(settings, device=device, precision=precision)


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
    """`odtk export`: writes the artifact; whether it passed ``verify``, if that was asked for.

    Args:
        settings: settings.ExportSettings by name.
    """
    with commands.explaining():
        verdict = commands.export(ExportSettings.of({"model": model, "output": output, **settings}))
    return verdict is None or verdict.passed


def evaluate(detections: Path, **settings: Any) -> Metrics:
    """`odtk evaluate`: prints and returns the COCO figures of a detections file.

    Args:
        settings: settings.EvaluateSettings by name; ``annotations`` is required.
    """
    with commands.explaining():
        return commands.evaluate(EvaluateSettings.of({"detections": detections, **settings}))
