"""The gated feed-forward half of a block."""

from __future__ import annotations

import onnx_ir as ir

from specquant.exporter.decoder import DecoderConfig, DecoderLayer
from specquant.exporter.graph.linear import linear
from specquant.exporter.graph.writer import GraphWriter


def gated_mlp(
    graph: GraphWriter, x: ir.Value, layer: DecoderLayer, config: DecoderConfig, rank: ir.Value | None, name: str
) -> ir.Value:
    """down(act(gate(x)) · up(x)); x and y [batch, sequence, hidden]."""
    both = linear(graph, x, layer.gate_up, rank)
    shape = ("batch", "sequence", config.intermediate_size)
    gate, up = (ir.val(f"{name}.{part}", graph.float_type, shape) for part in ("gate", "up"))
    graph.node("Split", [both], [gate, up], f"{name}.split", axis=-1, num_outputs=2)
    if config.activation == "silu":  # g · sigmoid(g): opset 23 has no operator for it
        sigmoid = graph.op("Sigmoid", [gate], f"{name}.sigmoid", shape)
        active = graph.op("Mul", [gate, sigmoid], f"{name}.silu", shape)
    else:
        active = graph.op("Gelu", [gate], f"{name}.gelu", shape, approximate="tanh")
    return linear(graph, graph.op("Mul", [active, up], f"{name}.product", shape), layer.down, rank)
