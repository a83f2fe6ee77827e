"""ONNX Runtime for a model in memory or a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx import ModelProto


def open_session(model: ModelProto | str, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """ONNX Runtime for a model or a file, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    content = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=list(providers))
