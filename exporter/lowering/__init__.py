"""From the graph of an artifact, which ONNX Runtime runs, to one of operators that TensorRT parses."""

from specquant.exporter.lowering.lower import PROFILES, lower

__all__ = ["PROFILES", "lower"]
