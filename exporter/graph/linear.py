"""A linear, or several that share their input, as one call."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.custom_ops.packing import pack_group_scales, pack_int4, segment_length
from specquant.custom_ops.schema import DOMAIN
from specquant.exporter.decoder import FloatLinear, Linear, QuantLinear
from specquant.exporter.graph.surroundings import Gate, RmsNorm
from specquant.exporter.graph.writer import GraphWriter


def linear(
    graph: GraphWriter,
    x: ir.Value,
    entry: Linear,
    rank: ir.Value | None,
    norm: RmsNorm | None = None,
    residual: ir.Value | None = None,
    gate: Gate | None = None,
) -> ir.Value:
    """y [batch, sequence, M] of x [batch, sequence, N]: x or its norm times the weights, plus residual (as y).
    With a gate the weights' first half are gates, their second ups, and y is [batch, sequence, M/2].

    `rank` is the graph's input of that name, if it has one. A quantised linear is one node, whatever surrounds it.
    """
    if isinstance(entry, FloatLinear):
        y = _float_linear(graph, norm.nodes(graph, x) if norm else x, entry)
        y = gate.nodes(graph, y) if gate else y
        return y if residual is None else graph.op("Add", [residual, y], f"{entry.name}.residual", y.shape)
    outputs = entry.q.shape[1] // 2 if gate else entry.q.shape[1]
    output = ir.val(entry.name, graph.float_type, ("batch", "sequence", outputs))
    quant_linear(graph, x, entry, rank, output, norm, residual, gate)
    return output


def _float_linear(graph: GraphWriter, x: ir.Value, entry: FloatLinear) -> ir.Value:
    """x · weight (+ bias)."""
    shape = ("batch", "sequence", entry.weight.shape[1])
    weight = graph.floats(f"{entry.name}.weight", entry.weight)
    if entry.bias is None:
        return graph.op("MatMul", [x, weight], entry.name, shape)
    product = graph.op("MatMul", [x, weight], f"{entry.name}.matmul", shape)
    return graph.op("Add", [product, graph.floats(f"{entry.name}.bias", entry.bias)], entry.name, shape)


def quant_linear(
    graph: GraphWriter,
    x: ir.Value,
    entry: QuantLinear,
    rank: ir.Value | None,
    output: ir.Value,
    norm: RmsNorm | None = None,
    residual: ir.Value | None = None,
    gate: Gate | None = None,
) -> None:
    """Write `output` with one `SpecQuantMatMul`, or one `Int4ResidualMatMul` where there is no branch (docs/ops.md)."""
    name, (n, m) = entry.name, entry.q.shape
    # With a gate, output i of the first half beside output i of the second.
    order = np.arange(m).reshape(2, -1).T.reshape(-1) if gate else slice(None)
    segment_length(n, entry.group_size, entry.act_group)  # says which group does not fit
    packed = (-(-m // 16), -(-n // 8), 64)
    weights = [
        graph.lazy(f"{name}.qweight", ir.DataType.INT8, packed, lambda: pack_int4(entry.q[:, order])),
        graph.tensor(f"{name}.group_scales", pack_group_scales(entry.group_scales[:, order])),
        graph.tensor(f"{name}.scales", entry.scales[order]),
        graph.once(f"no_bias.{m}", np.zeros(m, np.float32))
        if entry.bias is None
        else graph.tensor(f"{name}.bias", entry.bias[order]),
        graph.tensor(f"{norm.name}.weight", norm.weight) if norm else graph.once("no_norm", np.zeros(1, np.float32)),
        residual or graph.once("no_residual", np.zeros(1, graph.float_type.numpy())),
    ]
    attributes: dict[str, int | float] = {
        "group_size": entry.group_size,
        "act_bits": entry.act_bits,
        "act_group": entry.act_group,
        "act_clip": entry.act_clip,
        "hadamard": entry.hadamard,
    }
    if norm:
        attributes |= {"prologue": norm.index, "epsilon": norm.epsilon}
    if gate:
        attributes["gate"] = gate.index
    op_type, inputs = "Int4ResidualMatMul", [x, *weights]
    if entry.basis is not None and entry.coef is not None:
        branch = [graph.tensor(f"{name}.basis", entry.basis), graph.tensor(f"{name}.coef", entry.coef[:, order]), rank]
        op_type, inputs = "SpecQuantMatMul", [x, *branch, *weights]
        attributes["subtract"] = int(entry.subtract)
    graph.node(op_type, inputs, [output], name, domain=DOMAIN, **attributes)
