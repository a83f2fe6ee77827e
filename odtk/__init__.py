"""odtk: train a one-stage object detector, export it to TensorRT, run it."""

__version__ = "0.3.0"
