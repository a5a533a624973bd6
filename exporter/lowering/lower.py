"""The loop over an artifact's nodes: what TensorRT does not parse is replaced, the rest is taken over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.schema import DOMAIN, VERSION
from specquant.exporter.graph.writer import GraphWriter
from specquant.exporter.lowering.attention import OPERANDS, positions_of_new_tokens, standard_attention
from specquant.exporter.lowering.context import Lowering, attributes, dims
from specquant.exporter.lowering.linear import plugin_linear, portable_linear

OPSET = 24  # the first with TensorScatter
IR_VERSION = 11
LINEARS: dict[str, Callable[[Lowering, ir.Node], ir.Value]] = {"portable": portable_linear, "custom": plugin_linear}
PROFILES = tuple(LINEARS)
_MADE_ANEW = "attention."  # of positions_of_new_tokens: how the old graph counts its tokens is dropped


def lower(folder: Path, profile: str, capacity: int, rank: int | None = None) -> ir.Model:
    """The graph of the artifact in `folder` for TensorRT; weights stay in its file until they are written.

    profile `portable`: standard operators of opset 24 only, activations and KV cache in the graph's float type;
    `custom`: SpecQuantMatMul and Int4ResidualMatMul stay, for plugins of that name. Inputs and outputs are those of
    docs/formats.md, but for the cache: past and present are one buffer [batch, kv_heads, capacity, head_dim], and
    logits_to_keep is an input without a default. rank: columns kept of every branch, None for all.
    Raises SpecQuantError: no readable graph, an operator without a counterpart, a 4-bit cache in `custom`.
    """
    path = folder / "model.onnx"
    try:
        old = ir.load(path).graph
    except Exception as error:  # protobuf's, onnx's and the file system's
        raise SpecQuantError(f"{path} cannot be read ({_line(error)}): re-export the model") from None
    if profile == "custom" and any(node.op_type == "Int4KVAttention" for node in old):
        raise SpecQuantError(
            "the custom profile has no 4-bit KV cache yet (Int4KVAttention has no CUDA kernel): "
            "use --profile portable, or export with --kv-bits 16"
        )
    logits = old.outputs[0]
    low = Lowering(GraphWriter("float16" if logits.dtype == ir.DataType.FLOAT16 else "float32"), rank, capacity)
    inputs = _inputs(low, old)
    by_name = {str(value.name): value for value in inputs}
    positions_of_new_tokens(low, by_name["input_ids"], by_name["attention_mask"])
    for node in old:
        if not any(str(output.name).startswith(_MADE_ANEW) for output in node.outputs):
            _node(low, node, LINEARS[profile])
    outputs = [low.new(value) for value in old.outputs]
    used = {node.domain for node in low.graph.nodes}
    return ir.Model(
        ir.Graph(
            inputs,
            [value for value in outputs if value is not None],
            nodes=low.graph.nodes,
            initializers=low.graph.initializers,
            opset_imports={"": OPSET} | ({DOMAIN: VERSION} if DOMAIN in used else {}),
            name=old.name,
        ),
        ir_version=IR_VERSION,
        producer_name="specquant",
    )


def _inputs(low: Lowering, old: ir.Graph) -> list[ir.Value]:
    """The new graph's inputs: the old ones without `rank`, the cache with rows of `capacity` tokens."""
    heads = {
        str(node.inputs[index].name): _head_dim(node)
        for node in old
        if node.op_type in OPERANDS
        for index in OPERANDS[node.op_type][1:3]
    }
    inputs = []
    for value in old.inputs:
        if value.name == "rank":
            continue
        shape, dtype = dims(value), value.dtype
        if value.name in heads:
            shape, dtype = ["batch", shape[1], low.capacity, heads[value.name]], low.graph.float_type
        low.values[value] = ir.val(str(value.name), dtype, shape)
        inputs.append(low.values[value])
    return inputs


def _head_dim(node: ir.Node) -> int:
    given = attributes(node)
    width = int(dims(node.inputs[OPERANDS[node.op_type][0]])[-1])
    return width // (int(given["num_heads"]) + 2 * int(given["kv_num_heads"]))


def _node(low: Lowering, node: ir.Node, linear: Callable[[Lowering, ir.Node], ir.Value]) -> None:
    if node.domain == DOMAIN and node.op_type in ("SpecQuantMatMul", "Int4ResidualMatMul"):
        made: tuple[ir.Value, ...] = (linear(low, node),)
    elif node.op_type in OPERANDS:
        made = standard_attention(low, node)
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
