"""Self-attention with a packed 4-bit KV cache, as our `Int4KVAttention` (docs/ops.md)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.custom_ops.kv_rows import rotates_keys, row_bytes
from specquant.custom_ops.schema import DOMAIN
from specquant.exporter.decoder import DecoderConfig, DecoderLayer
from specquant.exporter.graph.writer import GraphWriter


def cache_row(graph: GraphWriter, config: DecoderConfig) -> tuple[int, ir.DataType]:
    """Elements of a token in the cache of a head, and their type. Raises SpecQuantError if head_dim does not suit."""
    if config.kv_bits == 4:
        return row_bytes(config.head_dim), ir.DataType.INT8
    return config.head_dim, graph.float_type


def int4_kv_attention(
    graph: GraphWriter,
    inputs: list[ir.Value],
    output: ir.Value,
    present: tuple[ir.Value, ir.Value],
    layer: DecoderLayer,
    config: DecoderConfig,
) -> ir.Value:
    """`inputs` are the op's but for the last, in its order; the rotary tables are cast to float32 if they are not.

    output is [batch, sequence, num_heads · head_dim] and named as the node; present as in `attention`.
    """
    name = output.name
    *others, cos, sin = inputs
    if graph.float_type != ir.DataType.FLOAT:
        cos, sin = (_float32(graph, table, f"{name}.{part}") for table, part in ((cos, "cos"), (sin, "sin")))
    shape = (config.num_kv_heads, config.head_dim)
    offset = np.zeros(shape, np.float32) if layer.key_offset is None else layer.key_offset
    graph.node(
        "Int4KVAttention",
        [*others, cos, sin, graph.tensor(f"{name}.key_offset", offset)],
        [output, *present],
        str(name),
        DOMAIN,
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        local_window_size=layer.window or -1,
        scale=config.attention_scale,
        hadamard=int(rotates_keys(config.head_dim)),
        clip=config.kv_clip,
    )
    return output


def _float32(graph: GraphWriter, table: ir.Value, name: str) -> ir.Value:
    return graph.op("Cast", [table], name, table.shape, ir.DataType.FLOAT, to=ir.DataType.FLOAT)
