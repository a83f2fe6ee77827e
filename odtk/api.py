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
from .config import OdtkError
from .settings import (
    FRACTION,
    BenchmarkSettings,
    CheckSettings,
    ConvertSettings,
    EvaluateSettings,
    ExportSettings,
    InferSettings,
    InfoSettings,
    PlanSettings,
    PretrainSettings,
    SynthSettings,
    TrainSettings,
    VisualizeSettings,
)

if TYPE_CHECKING:
    from .evaluation.evaluate import Metrics
    from .inference.predict import Model

Path = str | os.PathLike[str]


def named(settings: dict[str, Any], **positional: Path | None) -> dict[str, Any]:
    """All settings of a call by name; what was given by its place is not None.

    Raises:
        OdtkError: a setting was given twice.
    """
    for name, value in positional.items():
        if value is not None and name in settings:
            raise OdtkError(f"{name} is given twice: {os.fspath(value)!r} and {settings[name]!r}; keep one.")
    return {**settings, **{name: value for name, value in positional.items() if value is not None}}


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
    tiles: tuple[int, int] | None = None,
    overlap: float | None = None,
) -> Model:
    """A detector that is ready to run.

    Args:
        model: .pth, .onnx, .plan or .engine; the folder of a bundle; or a model on a Triton server, such as
            http://localhost:8000/detector.
        device: cpu, cuda or cuda:N; None: the first GPU where there is one.
        precision: of a .pth: mixed (fp16 on a GPU, fp32 on a CPU), fp16, bf16 or fp32; other files have their own.
        threshold: detections score above this; not below what is fixed in an exported file. None: 0.05, or what is
            fixed in the file.
        size: (H, W) that images are fitted into; None: as the model was trained or exported.
        resize: shorter side of the images in pixels; None: as the model was trained.
        max_size: cap of their longer side in pixels; None: as the model was trained.
        loader: dali, or torch, which is also taken where DALI cannot be imported.
        tiles: cut images and frames into tiles of (H, W) pixels; None: whole images.
        overlap: part of a tile that two neighbors share at least; None: 0.2.
    """
    if threshold is not None:
        try:
            FRACTION(threshold)
        except (TypeError, ValueError):
            raise OdtkError(f"threshold: {threshold!r} is not {FRACTION.words}.") from None
    settings = InferSettings.of(
        {
            "model": model,
            "score_threshold": threshold,
            "size": size,
            "resize": resize,
            "max_size": max_size,
            "loader": loader,
            "tiles": tiles,
            **({} if overlap is None else {"overlap": overlap}),
        }
    )
    with commands.explaining():
        return commands.load(settings, device=device, precision=precision)


def train(model: Path | None = None, /, **settings: Any) -> str:
    """`odtk train`: trains into ``model``, or resumes the run that is in it, and returns its path.

    Args:
        settings: settings.TrainSettings by name; ``annotations`` is required. None means: no preference.
    """
    with commands.explaining():
        return commands.train(TrainSettings.of(named(settings, model=model)))


def plan(annotations: Path | None = None, /, **settings: Any) -> dict[str, Any]:
    """`odtk plan`: prints what `odtk.train` would decide for a dataset on this machine, and returns its settings.

    Args:
        settings: settings.PlanSettings by name, which are those of `train`; ``output`` names a file for --settings.
    """
    with commands.explaining():
        return commands.plan(PlanSettings.of(named(settings, annotations=annotations)))


def pretrain(model: Path | None = None, /, **settings: Any) -> str:
    """`odtk pretrain`: trains a backbone as a classifier into ``model``, or resumes that, and returns its path.

    Args:
        settings: settings.PretrainSettings by name; ``images`` or ``labels`` is required. None means: no preference.
    """
    with commands.explaining():
        return commands.pretrain(PretrainSettings.of(named(settings, model=model)))


def infer(model: Path | None = None, /, **settings: Any) -> list[dict[str, Any]] | None:
    """`odtk infer`: COCO results of every image, also written to ``output``; None where several processes ran.

    Args:
        settings: settings.InferSettings by name.
    """
    with commands.explaining():
        return commands.infer(InferSettings.of(named(settings, model=model)), returns=True)


def export(model: Path | None = None, output: Path | None = None, /, **settings: Any) -> bool:
    """`odtk export`: writes the artifact; whether it passed ``verify``, if that was asked for.

    Args:
        settings: settings.ExportSettings by name.
    """
    with commands.explaining():
        verdict = commands.export(ExportSettings.of(named(settings, model=model, output=output)))
    return verdict is None or verdict.passed


def evaluate(detections: Path | None = None, /, **settings: Any) -> Metrics:
    """`odtk evaluate`: prints and returns the COCO figures of a detections file.

    Args:
        settings: settings.EvaluateSettings by name; ``annotations`` is required.
    """
    with commands.explaining():
        return commands.evaluate(EvaluateSettings.of(named(settings, detections=detections)))


def check(annotations: Path | None = None, /, **settings: Any) -> bool:
    """`odtk check`: prints what is wrong with a dataset; whether training would start on it.

    Of a folder without annotations (``images``): whether none of its images is damaged.

    Args:
        settings: settings.CheckSettings by name.
    """
    with commands.explaining():
        return commands.check(CheckSettings.of(named(settings, annotations=annotations)))


def convert(source: Path | None = None, target: Path | None = None, /, **settings: Any) -> None:
    """`odtk convert`: writes annotations in another format, and prints what was written.

    Args:
        settings: settings.ConvertSettings by name; ``to`` is required. ``box_format`` is the flag --from.
    """
    with commands.explaining():
        commands.convert(ConvertSettings.of(named(settings, source=source, target=target)))


def benchmark(model: Path | None = None, /, **settings: Any) -> None:
    """`odtk benchmark`: times a model and prints a table; ``output`` names a JSON file for the figures.

    Args:
        settings: settings.BenchmarkSettings by name.
    """
    with commands.explaining():
        commands.benchmark(BenchmarkSettings.of(named(settings, model=model)))


def visualize(model: Path | None = None, /, **settings: Any) -> list[str]:
    """`odtk visualize`: draws pictures, and returns their paths.

    Args:
        settings: settings.VisualizeSettings by name.
    """
    with commands.explaining():
        return commands.visualize(VisualizeSettings.of(named(settings, model=model)))


def synth(folder: Path | None = None, /, **settings: Any) -> None:
    """`odtk synth`: draws a dataset of shapes into ``folder``: train/, val/, train.json and val.json.

    Args:
        settings: settings.SynthSettings by name.
    """
    with commands.explaining():
        commands.synth(SynthSettings.of(named(settings, folder=folder)))


def info(model: Path | None = None, /, **settings: Any) -> dict[str, Any]:
    """`odtk info`: prints and returns what this machine can do, or what the file ``model`` says of itself.

    Returns:
        Plain values by name, as `odtk info --json` prints them.

    Raises:
        OdtkError: the file cannot be read; or, once all is printed, files of a bundle are not as they were written.

    Args:
        settings: settings.InfoSettings by name.
    """
    with commands.explaining():
        return commands.info(InfoSettings.of(named(settings, model=model)))
