"""A linear, or several that share their input, as one call."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.custom_ops.packing import pack_int4, row_sums, segment_length
from specquant.custom_ops.schema import DOMAIN
from specquant.exporter.decoder import FloatLinear, Linear, QuantLinear
from specquant.exporter.graph.prologue import Prologue, RmsNorm
from specquant.exporter.graph.writer import GraphWriter


def linear(
    graph: GraphWriter,
    x: ir.Value,
    entry: Linear,
    rank: ir.Value | None,
    prologue: Prologue | None = None,
    residual: ir.Value | None = None,
) -> ir.Value:
    """y [batch, sequence, M] of x: the prologue's outcome [batch, sequence, N] times the weights, plus residual (as y).

    `rank` is the graph's input of that name, if it has one. A quantised linear is one node, whatever surrounds it.
    """
    if isinstance(entry, FloatLinear):
        y = _float_linear(graph, prologue.nodes(graph, x) if prologue else x, entry)
        return y if residual is None else graph.op("Add", [residual, y], f"{entry.name}.residual", y.shape)
    output = ir.val(entry.name, graph.float_type, ("batch", "sequence", entry.q.shape[1]))
    quant_linear(graph, x, entry, rank, output, prologue, residual)
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
    prologue: Prologue | None = None,
    residual: ir.Value | None = None,
) -> None:
    """Write `output` with one `SpecQuantMatMul`, or one `Int4ResidualMatMul` where there is no branch (docs/ops.md)."""
    name, (n, m) = entry.name, entry.q.shape
    segment = segment_length(n, entry.group_size, entry.act_group)
    packed = (-(-m // 16), -(-n // 8), 64)
    bias = entry.bias if entry.bias is not None else np.zeros(m, np.float32)
    weights = [
        graph.lazy(f"{name}.qweight", ir.DataType.INT8, packed, lambda: pack_int4(entry.q)),
        graph.tensor(f"{name}.scales", entry.scales),
        graph.tensor(f"{name}.row_sums", row_sums(entry.q, segment)),
        graph.tensor(f"{name}.bias", bias),
        graph.tensor(f"{prologue.name}.weight", prologue.weight)
        if isinstance(prologue, RmsNorm)
        else graph.once("no_norm", np.zeros(1, np.float32)),
        residual or graph.once("no_residual", np.zeros(1, graph.float_type.numpy())),
    ]
    attributes: dict[str, int | float] = {
        "group_size": entry.group_size,
        "act_bits": entry.act_bits,
        "act_group": entry.act_group,
        "act_clip": entry.act_clip,
        "hadamard": entry.hadamard,
    }
    if prologue:
        attributes["prologue"] = prologue.index
    if isinstance(prologue, RmsNorm):
        attributes["epsilon"] = prologue.epsilon
    op_type, inputs = "Int4ResidualMatMul", [x, *weights]
    if entry.basis is not None and entry.coef is not None:
        branch = [graph.tensor(f"{name}.basis", entry.basis), graph.tensor(f"{name}.coef", entry.coef), rank]
        op_type, inputs = "SpecQuantMatMul", [x, *branch, *weights]
        attributes["subtract"] = int(entry.subtract)
    graph.node(op_type, inputs, [output], name, domain=DOMAIN, **attributes)
