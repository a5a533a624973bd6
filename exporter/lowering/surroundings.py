"""Norm, gate and residual of a matmul op in standard operators, as nodes around what computes the product."""

from __future__ import annotations

import onnx_ir as ir

from specquant.custom_ops.schema import GATES, PROLOGUES
from specquant.exporter.graph.surroundings import Gate, RmsNorm
from specquant.exporter.lowering.context import Lowering, attributes, dims


def prologue(low: Lowering, node: ir.Node, norm: int) -> ir.Value:
    """x̂ [..., N] of the node's x (docs/ops.md); `norm`: which of its inputs that is."""
    x, given, name = low.input(node, 0), attributes(node), str(node.name)
    kind = int(given.get("prologue", 0))
    if kind == PROLOGUES.index("rms_norm"):
        return RmsNorm(f"{name}.norm", low.array(node, norm), float(given["epsilon"])).nodes(low.graph, x)
    return x


def gated(low: Lowering, node: ir.Node, y: ir.Value) -> ir.Value:
    """Of y [..., M], whose gates and ups lie side by side in pairs: [..., M/2]; without a gate y itself."""
    kind = int(attributes(node).get("gate", 0))
    if not kind:
        return y
    activation = "silu" if kind == GATES.index("silu") else "gelu_tanh"
    return Gate(f"{node.name}.gate", activation).nodes(low.graph, y, interleaved=True)


def add_residual(low: Lowering, node: ir.Node, residual: int, y: ir.Value) -> ir.Value:
    """y [..., M] plus the node's input `residual`, unless that is a constant, the dummy."""
    value = node.inputs[residual]
    if value is None or value.const_value is not None:
        return y
    return low.graph.op("Add", [low.input(node, residual), y], f"{node.name}.added", dims(node.outputs[0]))
