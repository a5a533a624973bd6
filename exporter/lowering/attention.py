"""Attention and its KV cache in standard operators: RotaryEmbedding, TensorScatter, Attention of opset 24.

The cache is one buffer a layer, float [batch, kv_heads, capacity, head_dim], that a call extends in place: TensorRT
makes TensorScatter's cache an aliased input. Attention then reads what attention_mask i64[batch, total] covers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.exporter.lowering.context import Attributes, Lowering, attributes, dims

_BOOL, _I64 = ir.DataType.BOOL, ir.DataType.INT64
Outputs = tuple[ir.Value, ir.Value, ir.Value]  # y, present key, present value

# Where the old ops keep their operands: qkv, past_key, past_value, position_ids, cos, sin.
_OURS = (0, 1, 2, 5, 6, 7)
OPERANDS = {"GroupQueryAttention": (0, 3, 4, 9, 7, 8), "Int4KVAttention": _OURS, "HalfKVAttention": _OURS}


def standard_attention(low: Lowering, node: ir.Node) -> Outputs:
    """y [batch, sequence, heads · d] and the present cache of `GroupQueryAttention`, or of one of our ops with the
    cache in the graph's float type: the key_offset and Hadamard matrix of Int4KVAttention change no score, and are left
    out."""
    graph, name, given = low.graph, str(node.name), attributes(node)
    heads, kv_heads = int(given["num_heads"]), int(given["kv_num_heads"])
    places = OPERANDS[node.op_type]
    width = int(dims(node.inputs[places[0]])[-1])
    d = width // (heads + 2 * kv_heads)
    q, k, v = _split_heads(low, low.input(node, places[0]), (heads, kv_heads, kv_heads), d, name)
    positions, cos, sin = (low.input(node, index) for index in places[3:])
    cos, sin = (_as_floats(low, table) for table in (cos, sin))
    rotary = 2 * int(dims(node.inputs[places[4]])[-1])
    partial: Attributes = {} if rotary == d else {"rotary_embedding_dim": rotary}
    q, k = (
        graph.op("RotaryEmbedding", [part, cos, sin, positions], f"{name}.rotary_{label}", dims(part), **partial)
        for label, part in (("q", q), ("k", k))
    )
    window = int(given.get("local_window_size", -1))
    present: list[ir.Value] = []
    seen: list[ir.Value] = []
    for label, update, index in (("key", k, places[1]), ("value", v, places[2])):
        past = low.input(node, index)
        output = ir.val(str(node.outputs[len(present) + 1].name), graph.float_type, past.shape)
        graph.node("TensorScatter", [past, update, low.shared["start"]], [output], f"{name}.append_{label}", axis=2)
        present.append(output)
        used = ("batch", kv_heads, "total_sequence", d)
        slice_inputs = [output, low.ints(0), low.shared["total"], low.ints(2)]
        seen.append(graph.op("Slice", slice_inputs, f"{name}.used_{label}", used))
    scale = float(given.get("scale", 0.0)) or d**-0.5
    by_head = graph.op(
        "Attention", [q, *seen, _mask(low, window)], f"{name}.attended", ("batch", heads, "sequence", d), scale=scale
    )
    by_token = graph.op("Transpose", [by_head], f"{name}.by_token", ("batch", "sequence", heads, d), perm=[0, 2, 1, 3])
    y = graph.op("Reshape", [by_token, low.ints(0, 0, heads * d)], name, ("batch", "sequence", heads * d))
    return y, present[0], present[1]


def positions_of_new_tokens(low: Lowering, input_ids: ir.Value, attention_mask: ir.Value) -> None:
    """What all layers share, from the mask's count of tokens a row and its length.

    start i64[batch]: where the new tokens go in each row, as GroupQueryAttention has it: max(0, tokens − sequence);
    total i64[1]; query i64[batch, sequence, 1]: the slot of each new token; slot i64[total]: 0, 1, 2, …
    """
    graph, shared = low.graph, low.shared
    zero, one = (low.once(f"number.{n}", np.array(n, np.int64)) for n in (0, 1))
    tokens = graph.op("ReduceSum", [attention_mask, low.ints(1)], "cache.tokens", ("batch",), _I64, keepdims=0)
    sequence = low.sizes(input_ids, 1, 2, "cache.sequence")
    before = graph.op("Sub", [tokens, sequence], "cache.before", ("batch",), _I64)
    shared["start"] = graph.op("Max", [before, low.ints(0)], "cache.start", ("batch",), _I64)
    shared["total"] = low.sizes(attention_mask, 1, 2, "cache.total")
    count = graph.op("Squeeze", [sequence, low.ints(0)], "cache.sequence_scalar", (), _I64)
    new = graph.op("Range", [zero, count, one], "cache.new", ("sequence",), _I64)
    column = graph.op("Unsqueeze", [shared["start"], low.ints(1)], "cache.start_column", ("batch", 1), _I64)
    query = graph.op("Add", [column, new], "cache.query_slot", ("batch", "sequence"), _I64)
    shared["query"] = graph.op("Unsqueeze", [query, low.ints(2)], "cache.query", ("batch", "sequence", 1), _I64)
    total = graph.op("Squeeze", [shared["total"], low.ints(0)], "cache.total_scalar", (), _I64)
    shared["slot"] = graph.op("Range", [zero, total, one], "cache.slot", ("total_sequence",), _I64)


def _mask(low: Lowering, window: int) -> ir.Value:
    """bool [batch, 1, sequence, total]: a query sees the slots up to its own, the last `window` of them (−1: all)."""
    name = f"cache.mask.{window}"
    if name in low.shared:
        return low.shared[name]
    graph, slot, query = low.graph, low.shared["slot"], low.shared["query"]
    shape = ("batch", "sequence", "total_sequence")
    seen = graph.op("LessOrEqual", [slot, query], f"{name}.causal", shape, _BOOL)
    if window > 0:
        oldest = graph.op("Sub", [query, low.ints(window)], f"{name}.oldest", ("batch", "sequence", 1), _I64)
        near = graph.op("Greater", [slot, oldest], f"{name}.near", shape, _BOOL)
        seen = graph.op("And", [seen, near], f"{name}.both", shape, _BOOL)
    low.shared[name] = graph.op("Unsqueeze", [seen, low.ints(1)], name, ("batch", 1, *shape[1:]), _BOOL)
    return low.shared[name]


def _split_heads(
    low: Lowering, qkv: ir.Value, counts: tuple[int, int, int], d: int, name: str
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """qkv [batch, sequence, Σ counts · d] → three of [batch, count, sequence, d]."""
    graph, total = low.graph, sum(counts)
    by_token = graph.op(
        "Reshape", [qkv, low.ints(0, 0, total, d)], f"{name}.qkv_heads", ("batch", "sequence", total, d)
    )
    by_head = graph.op("Transpose", [by_token], f"{name}.by_head", ("batch", total, "sequence", d), perm=[0, 2, 1, 3])
    parts = [
        ir.val(f"{name}.new_{part}", graph.float_type, ("batch", count, "sequence", d))
        for part, count in zip("qkv", counts, strict=True)
    ]
    graph.node("Split", [by_head, low.ints(*counts)], parts, f"{name}.split_qkv", axis=1)
    return parts[0], parts[1], parts[2]


def _as_floats(low: Lowering, table: ir.Value) -> ir.Value:
    """A rotary table in the graph's float type: our ops have it in float32."""
    graph = low.graph
    if table.dtype == graph.float_type:
        return table
    name = f"{table.name}.float"
    if name not in low.shared:
        low.shared[name] = graph.op("Cast", [table], name, dims(table), to=graph.float_type)
    return low.shared[name]
