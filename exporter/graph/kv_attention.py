"""Self-attention with a KV cache of 4 bits or of float16, as our ops have it (docs/ops.md)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.custom_ops.kv_rows import rotates_keys, row_bytes
from specquant.custom_ops.schema import DOMAIN
from specquant.exporter.decoder import Decoder, DecoderLayer
from specquant.exporter.graph.writer import GraphWriter


def cache_row(graph: GraphWriter, decoder: Decoder) -> tuple[int, ir.DataType]:
    """Elements of a token in the cache of a head, and their type. Raises SpecQuantError if head_dim does not suit."""
    head_dim = decoder.config.head_dim
    if decoder.attention_op == "Int4KVAttention":
        return row_bytes(head_dim), ir.DataType.INT8
    return head_dim, ir.DataType.FLOAT16 if decoder.attention_op == "HalfKVAttention" else graph.float_type


def kv_attention(
    graph: GraphWriter,
    inputs: list[ir.Value],
    output: ir.Value,
    present: tuple[ir.Value, ir.Value],
    layer: DecoderLayer,
    decoder: Decoder,
) -> ir.Value:
    """`decoder.attention_op`. `inputs` are the op's but for the key offset, in its order; the rotary tables are cast to
    float32 if they are not.

    output is [batch, sequence, num_heads · head_dim] and named as the node; present as in `attention`.
    """
    name, config = output.name, decoder.config
    *others, cos, sin = inputs
    if graph.float_type != ir.DataType.FLOAT:
        cos, sin = (_float32(graph, table, f"{name}.{part}") for table, part in ((cos, "cos"), (sin, "sin")))
    inputs = [*others, cos, sin]
    rounding: dict[str, int | float] = {}
    if decoder.attention_op == "Int4KVAttention":
        shape = (config.num_kv_heads, config.head_dim)
        offset = np.zeros(shape, np.float32) if layer.key_offset is None else layer.key_offset
        inputs.append(graph.tensor(f"{name}.key_offset", offset))
        rounding = {"hadamard": int(rotates_keys(config.head_dim)), "clip": config.kv_clip}
    graph.node(
        decoder.attention_op,
        inputs,
        [output, *present],
        str(name),
        DOMAIN,
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        local_window_size=layer.window or -1,
        scale=config.attention_scale,
        **rounding,
    )
    return output


def _float32(graph: GraphWriter, table: ir.Value, name: str) -> ir.Value:
    return graph.op("Cast", [table], name, table.shape, ir.DataType.FLOAT, to=ir.DataType.FLOAT)
