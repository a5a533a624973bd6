"""The loop over an artifact's nodes: what TensorRT does not parse is replaced, the rest is taken over."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.schema import DOMAIN, VERSION
from specquant.exporter.graph.writer import GraphWriter
from specquant.exporter.lowering.attention import OPERANDS, positions_of_new_tokens, standard_attention
from specquant.exporter.lowering.context import Lowering, attributes, dims
from specquant.exporter.lowering.linear import portable_linear
from specquant.exporter.lowering.plugins import (
    ATTENTION,
    only_casts_a_table,
    plugin_attention,
    plugin_linear,
    tokens_of_rows,
)

OPSET = 24  # the first with TensorScatter
IR_VERSION = 11
PROFILES = ("portable", "custom")
LINEARS = ("SpecQuantMatMul", "Int4ResidualMatMul")
_MADE_ANEW = "attention."  # how the old graph counts its tokens is dropped


def lower(folder: Path, profile: str, capacity: int, rank: int | None = None) -> ir.Model:
    """The graph of the artifact in `folder` for TensorRT; weights stay in its file until they are written.

    profile `portable`: standard operators of opset 24 only, activations and KV cache in the graph's float type;
    `custom`: our ops stay, for plugins of their names, and with them the artifact's cache. Inputs and outputs are those
    of docs/formats.md, but for the cache: past and present are one buffer of `capacity` tokens a row, and
    logits_to_keep is an input without a default. rank: columns kept of every branch, None for all.
    Raises SpecQuantError: no readable graph, an operator without a counterpart.
    """
    path = folder / "model.onnx"
    try:
        old = ir.load(path).graph
    except Exception as error:  # protobuf's, onnx's and the file system's
        raise SpecQuantError(f"{path} cannot be read ({_line(error)}): re-export the model") from None
    logits = old.outputs[0]
    low = Lowering(GraphWriter("float16" if logits.dtype == ir.DataType.FLOAT16 else "float32"), rank, capacity)
    kept = (*LINEARS, *ATTENTION) if profile == "custom" else ()
    inputs = _inputs(low, old, kept)
    by_name = {str(value.name): value for value in inputs}
    used = {node.op_type for node in old}
    if used & set(ATTENTION) & set(kept):
        tokens_of_rows(low, by_name["attention_mask"])
    if (used & set(OPERANDS)) - set(kept):
        positions_of_new_tokens(low, by_name["input_ids"], by_name["attention_mask"])
    for node in old:
        anew = any(str(output.name).startswith(_MADE_ANEW) for output in node.outputs)
        if not anew and not (kept and only_casts_a_table(node)):
            _node(low, node, node.op_type in kept)
    outputs = [low.new(value) for value in old.outputs]
    domains = {node.domain for node in low.graph.nodes}
    return ir.Model(
        ir.Graph(
            inputs,
            [value for value in outputs if value is not None],
            nodes=low.graph.nodes,
            initializers=low.graph.initializers,
            opset_imports={"": OPSET} | ({DOMAIN: VERSION} if DOMAIN in domains else {}),
            name=old.name,
        ),
        ir_version=IR_VERSION,
        producer_name="specquant",
    )


def _inputs(low: Lowering, old: ir.Graph, kept: tuple[str, ...]) -> list[ir.Value]:
    """The new graph's inputs: the old ones without `rank`, the cache with `capacity` tokens a row.

    A token is as in the artifact where its op is kept, else head_dim floats.
    """
    heads = {
        str(node.inputs[index].name): _head_dim(node)
        for node in old
        if node.op_type in OPERANDS
        for index in OPERANDS[node.op_type][1:3]
        if node.op_type not in kept
    }
    inputs = []
    for value in old.inputs:
        if value.name == "rank":
            continue
        shape, dtype = dims(value), value.dtype
        if value.name in heads:
            shape, dtype = [*shape[:3], heads[value.name]], low.graph.float_type
        if str(value.name).startswith("past_key_values."):
            shape = [*shape[:2], low.capacity, shape[3]]
        low.values[value] = ir.val(str(value.name), dtype, shape)
        inputs.append(low.values[value])
    return inputs


def _head_dim(node: ir.Node) -> int:
    given = attributes(node)
    width = int(dims(node.inputs[OPERANDS[node.op_type][0]])[-1])
    return width // (int(given["num_heads"]) + 2 * int(given["kv_num_heads"]))


def _node(low: Lowering, node: ir.Node, keep: bool) -> None:
    if node.op_type in LINEARS:
        made: tuple[ir.Value, ...] = (plugin_linear(low, node) if keep else portable_linear(low, node),)
    elif node.op_type in OPERANDS:
        made = plugin_attention(low, node) if keep else standard_attention(low, node)
    elif (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul"):
        made = (_head(low, node),)
    elif node.domain == "":
        made = tuple(ir.val(str(v.name), v.dtype, v.shape) for v in node.outputs)
        low.graph.node(node.op_type, [low.new(v) for v in node.inputs], made, str(node.name), "", **attributes(node))
    else:
        raise SpecQuantError(f"{node.domain}.{node.op_type} has no counterpart in TensorRT: re-export the model")
    low.values.update(zip(node.outputs, made, strict=True))


def _head(low: Lowering, node: ir.Node) -> ir.Value:
    """logits = x · tableᵀ. Gemm reads the table as it lies, so that a tied one is stored once; it takes two axes."""
    graph, x, table = low.graph, low.input(node, 0), low.input(node, 1)
    leading, (vocab, hidden) = dims(node.outputs[0])[:-1], dims(node.inputs[1])
    rows = graph.op("Reshape", [x, low.ints(-1, hidden)], "lm_head.rows", ("rows", hidden))
    flat = graph.op("Gemm", [rows, table], "lm_head.flat", ("rows", vocab), transB=1)
    lead = low.sizes(x, 0, 2, "lm_head.leading")
    shape = graph.op("Concat", [lead, low.ints(vocab)], "lm_head.shape", (3,), ir.DataType.INT64, axis=0)
    return graph.op("Reshape", [flat, shape], str(node.outputs[0].name), (*leading, vocab), allowzero=1)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
