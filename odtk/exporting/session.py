"""ONNX Runtime for a model in memory or a file. Importable without onnx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from onnx import ModelProto


def open_session(model: ModelProto | str, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """An ``onnxruntime.InferenceSession`` that uses as many threads as torch.

    Args:
        model: a model in memory, or the path of an .onnx file.
        providers: ONNX Runtime's execution providers, the preferred one first.

    Raises:
        Exception: ONNX Runtime's own, which have no common base, for a file that it cannot run.
    """
    import onnxruntime  # here: only .onnx files and INT8 need it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    content = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=list(providers))
