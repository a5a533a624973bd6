"""Nodes of our ops as TensorRT's plugins of that name, in namespace `specquant`, take them (profile `custom`)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.custom_ops.schema import DOMAIN, OPS
from specquant.exporter.lowering.context import Lowering, attributes, dims

ATTENTION = ("Int4KVAttention", "HalfKVAttention")
_I64, _I32 = ir.DataType.INT64, ir.DataType.INT32


def plugin_linear(low: Lowering, node: ir.Node) -> ir.Value:
    """`SpecQuantMatMul` or `Int4ResidualMatMul`, as in the artifact but for the rank.

    It is a constant: with fewer columns than the artifact's, `basis` and `coef` are cut, and with none the op is the
    one without a branch.
    """
    graph, name, op_type, given = low.graph, str(node.name), node.op_type, attributes(node)
    at = {tensor.name: index for index, tensor in enumerate(OPS[op_type].inputs)}
    rank = 0
    if "basis" in at:
        columns = int(dims(node.inputs[at["basis"]])[1])
        rank = columns if low.rank is None else min(low.rank, columns)
    if not rank:
        op_type = "Int4ResidualMatMul"
        given.pop("subtract", None)
    inputs = []
    for key in (tensor.name for tensor in OPS[op_type].inputs):
        if key == "rank":
            inputs.append(graph.tensor(f"{name}.rank", np.array([rank], np.int64)))
        elif key in ("basis", "coef") and low.rank is not None:
            array = low.array(node, at[key])
            cut = array[:, :rank] if key == "basis" else array[:rank]
            inputs.append(graph.tensor(f"{name}.{key}", np.ascontiguousarray(cut)))
        else:
            inputs.append(low.input(node, at[key]))
    y = ir.val(str(node.outputs[0].name), graph.float_type, dims(node.outputs[0]))
    graph.node(op_type, inputs, [y], name, DOMAIN, **given)
    return y


def plugin_attention(low: Lowering, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """y, present key and value of a node of ATTENTION. Present is past, with room for the new tokens.

    total_sequence_length is the cache's capacity, a constant: at least as long as every row, and all that kernels use
    it for is the rows of present. Tables are cut to that length, and float32 once for all layers.
    """
    past = [low.input(node, index) for index in (1, 2)]
    total = low.once("cache.capacity", np.array(low.capacity, np.int32))
    inputs = [low.input(node, 0), *past, low.shared["seqlens_k"], total, low.input(node, 5)]
    inputs += [_table(low, node.inputs[index]) for index in (6, 7)]
    inputs += [low.input(node, index) for index in range(8, len(node.inputs))]
    y = ir.val(str(node.outputs[0].name), low.graph.float_type, dims(node.outputs[0]))
    present = [ir.val(str(v.name), p.dtype, p.shape) for v, p in zip(node.outputs[1:], past, strict=True)]
    low.graph.node(node.op_type, inputs, [y, *present], str(node.name), DOMAIN, **attributes(node))
    return y, present[0], present[1]


def tokens_of_rows(low: Lowering, attention_mask: ir.Value) -> None:
    """seqlens_k i32[batch], which all layers share: what the mask says of a row's tokens, less one."""
    graph = low.graph
    tokens = graph.op("ReduceSum", [attention_mask, low.ints(1)], "cache.row_tokens", ("batch",), _I64, keepdims=0)
    last = graph.op("Sub", [tokens, low.ints(1)], "cache.last", ("batch",), _I64)
    low.shared["seqlens_k"] = graph.op("Cast", [last], "cache.seqlens_k", ("batch",), _I32, to=_I32)


def only_casts_a_table(node: ir.Node) -> bool:
    """Whether a node makes a rotary table float32 for nodes of ATTENTION alone: plugin_attention does without it."""
    if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return False
    return all(user.node.op_type in ATTENTION for user in node.outputs[0].uses())


def _table(low: Lowering, value: ir.Value | None) -> ir.Value:
    producer = None if value is None else value.producer()
    source = value if producer is None else producer.inputs[0]
    array = low.constant(source).numpy()[: low.capacity].astype(np.float32)
    return low.once(f"{None if source is None else source.name}.float32", array)
