"""The ONNX graph of a decoder, one part a file."""

from specquant.exporter.graph.model import build_model
from specquant.exporter.graph.save import save_model

__all__ = ["build_model", "save_model"]
