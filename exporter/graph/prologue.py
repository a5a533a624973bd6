"""What becomes of a linear's input first: a norm or a gate, inside the op or as nodes of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.custom_ops.schema import PROLOGUES
from specquant.exporter.graph.norm import rms_norm
from specquant.exporter.graph.writer import GraphWriter


@dataclass(frozen=True)
class RmsNorm:
    """x / √(mean(x²) + epsilon) · weight, float32 [N], an initialiser of name `{name}.weight`."""

    name: str
    weight: NDArray[np.float32]
    epsilon: float
    index = PROLOGUES.index("rms_norm")

    def nodes(self, graph: GraphWriter, x: ir.Value) -> ir.Value:
        return rms_norm(graph, x, self.weight, self.epsilon, self.name)


@dataclass(frozen=True)
class Gate:
    """act(gate) · up of x [..., 2 · features], gate and up side by side; activation `silu` or `gelu_tanh`."""

    name: str
    activation: str
    features: int

    @property
    def index(self) -> int:
        return PROLOGUES.index("silu_gate" if self.activation == "silu" else "gelu_gate")

    def nodes(self, graph: GraphWriter, x: ir.Value) -> ir.Value:
        shape = ("batch", "sequence", self.features)
        gate, up = (ir.val(f"{self.name}.{part}", graph.float_type, shape) for part in ("gate", "up"))
        graph.node("Split", [x], [gate, up], f"{self.name}.split", axis=-1, num_outputs=2)
        if self.activation == "silu":  # g · sigmoid(g): opset 23 has no operator for it
            sigmoid = graph.op("Sigmoid", [gate], f"{self.name}.sigmoid", shape)
            active = graph.op("Mul", [gate, sigmoid], f"{self.name}.silu", shape)
        else:
            active = graph.op("Gelu", [gate], f"{self.name}.gelu", shape, approximate="tanh")
        return graph.op("Mul", [active, up], f"{self.name}.product", shape)


Prologue = RmsNorm | Gate
