"""odtk: train a one-stage object detector, export it to TensorRT, run it.

    model = odtk.load("model.onnx")            found = model.predict("image.jpg")
    odtk.train("model.pth", annotations="train.json", epochs=20)
    odtk.export("model.pth", "model.onnx")     odtk.evaluate("detections.json", annotations="val.json")

The names are imported when they are first used, so that `import odtk` costs nothing (PEP 562).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from .api import (
        benchmark,
        check,
        convert,
        evaluate,
        export,
        infer,
        info,
        load,
        plan,
        pretrain,
        synth,
        train,
        visualize,
    )
    from .config import OdtkError
    from .inference.predict import Detections, Model

_HOMES = {
    "load": "api",
    "train": "api",
    "plan": "api",
    "pretrain": "api",
    "infer": "api",
    "export": "api",
    "evaluate": "api",
    "check": "api",
    "convert": "api",
    "benchmark": "api",
    "visualize": "api",
    "synth": "api",
    "info": "api",
    "OdtkError": "config",
    "Model": "inference.predict",
    "Detections": "inference.predict",
}
__all__ = [
    "Detections",
    "Model",
    "OdtkError",
    "benchmark",
    "check",
    "convert",
    "evaluate",
    "export",
    "infer",
    "info",
    "load",
    "plan",
    "pretrain",
    "synth",
    "train",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'odtk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
