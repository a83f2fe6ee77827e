"""A model of Triton's Python backend that runs the ONNX file beside it: what the ONNX Runtime backend is to do.

Each call notes its batches in the file that the parameter BATCHES names.
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.batches = parameters["BATCHES"]["string_value"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"), options)

    def execute(self, requests):
        given = [pb.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        with open(self.batches, "a") as file:
            file.write(f"{[len(images) for images in given]}\n")
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, {"images": np.concatenate(given)})
        ends = np.cumsum([len(images) for images in given])
        parts = zip(*(np.split(values, ends[:-1]) for values in found), strict=True)
        return [
            pb.InferenceResponse([pb.Tensor(name, part) for name, part in zip(names, one, strict=True)])
            for one in parts
        ]
