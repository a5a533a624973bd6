"""What surrounds a linear, inside its op or as nodes of their own: a norm before it, a gate after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.custom_ops.schema import GATES, PROLOGUES
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
    """act(gate) · up of gate and up; activation `silu` or `gelu_tanh`."""

    name: str
    activation: str

    @property
    def index(self) -> int:
        return GATES.index("silu" if self.activation == "silu" else "gelu")

    def nodes(self, graph: GraphWriter, x: ir.Value, *, interleaved: bool = False) -> ir.Value:
        """Of x [..., 2N]: [..., N]. Gates come first, then ups, or each pair side by side."""
        sizes: list[Any] = list(x.shape or ())
        last, width = len(sizes) - 1, int(sizes[-1])
        shape = (*sizes[:-1], width // 2)
        gate, up = (ir.val(f"{self.name}.{part}", graph.float_type, shape) for part in ("gate", "up"))
        if interleaved:
            names = [f"{self.name}.{part}" for part in ("axis", "step", "end", "first", "second")]
            values = (last, 2, width, 0, 1)
            axis, step, end, *starts = (
                graph.once(name, np.array([value], np.int64)) for name, value in zip(names, values, strict=True)
            )
            for part, start in zip((gate, up), starts, strict=True):
                graph.node("Slice", [x, start, end, axis, step], [part], str(part.name))
        else:
            graph.node("Split", [x], [gate, up], f"{self.name}.split", axis=-1, num_outputs=2)
        if self.activation == "silu":  # g · sigmoid(g): opset 23 has no operator for it
            sigmoid = graph.op("Sigmoid", [gate], f"{self.name}.sigmoid", shape)
            active = graph.op("Mul", [gate, sigmoid], f"{self.name}.silu", shape)
        else:
            active = graph.op("Gelu", [gate], f"{self.name}.gelu", shape, approximate="tanh")
        return graph.op("Mul", [active, up], f"{self.name}.product", shape)
