"""The gated feed-forward half of a block."""

from __future__ import annotations

import onnx_ir as ir

from specquant.exporter.decoder import Linear
from specquant.exporter.graph.linear import linear
from specquant.exporter.graph.writer import GraphWriter


def gated_mlp(
    graph: GraphWriter, x: ir.Value, gate_up: Linear, down: Linear, rank: ir.Value | None, name: str
) -> ir.Value:
    """down(silu(gate(x)) · up(x)), silu(g) = g · sigmoid(g); x and y [batch, sequence, hidden]."""
    both = linear(graph, x, gate_up, rank)
    shape = ("batch", "sequence", next(iter(gate_up.parts.values())))
    gate, up = (ir.val(f"{name}.{part}", graph.float_type, shape) for part in ("gate", "up"))
    graph.node("Split", [both], [gate, up], f"{name}.split", axis=-1, num_outputs=2)
    sigmoid = graph.op("Sigmoid", [gate], f"{name}.sigmoid", shape)
    silu = graph.op("Mul", [gate, sigmoid], f"{name}.silu", shape)
    return linear(graph, graph.op("Mul", [silu, up], f"{name}.product", shape), down, rank)
