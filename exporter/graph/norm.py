"""Root-mean-square normalisation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.exporter.graph.writer import GraphWriter


def rms_norm(graph: GraphWriter, x: ir.Value, weight: NDArray[np.float32], epsilon: float, name: str) -> ir.Value:
    """x / √(mean(x²) + epsilon) · weight over the last axis, computed in float32; x [batch, sequence, hidden]."""
    scale = graph.floats(f"{name}.weight", weight)
    shape = ("batch", "sequence", weight.shape[0])
    return graph.op("RMSNormalization", [x, scale], name, shape, axis=-1, epsilon=epsilon)
