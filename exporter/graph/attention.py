"""Self-attention with a KV cache: ONNX Runtime's `GroupQueryAttention`, or one of our ops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.exporter.decoder import Decoder, DecoderLayer
from specquant.exporter.graph.kv_attention import kv_attention
from specquant.exporter.graph.writer import GraphWriter


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares.

    seqlens_k i32[batch]: tokens of each row, the new ones included, less one; total_sequence_length i32[]: the
    longest of them; position_ids i64[batch, sequence]; rotary: (cos, sin) [context_length, rotary_dim / 2] of each
    table (`DecoderLayer.rotary` says which is the layer's).
    """

    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    position_ids: ir.Value
    rotary: list[tuple[ir.Value, ir.Value]]


def attention_inputs(
    graph: GraphWriter,
    attention_mask: ir.Value,
    position_ids: ir.Value,
    rope_cos: NDArray[np.float32],
    rope_sin: NDArray[np.float32],
) -> AttentionInputs:
    """Count the tokens in attention_mask i64[batch, total_sequence], once for all layers."""
    i64, i32 = ir.DataType.INT64, ir.DataType.INT32
    one = graph.tensor("attention.one", np.array(1, np.int64))
    axis = graph.tensor("attention.sequence_axis", np.array([1], np.int64))
    tokens = graph.op("ReduceSum", [attention_mask, axis], "attention.tokens", ("batch",), i64, keepdims=0)
    last = graph.op("Sub", [tokens, one], "attention.last_position", ("batch",), i64)
    shape = graph.op("Shape", [attention_mask], "attention.mask_shape", (2,), i64)
    total = graph.op("Gather", [shape, one], "attention.total", (), i64, axis=0)
    names = ["rotary"] if len(rope_cos) == 1 else [f"rotary.{i}" for i in range(len(rope_cos))]
    return AttentionInputs(
        graph.op("Cast", [last], "attention.seqlens_k", ("batch",), i32, to=i32),
        graph.op("Cast", [total], "attention.total_sequence_length", (), i32, to=i32),
        position_ids,
        [
            (graph.floats(f"{name}.cos", cos), graph.floats(f"{name}.sin", sin))
            for name, cos, sin in zip(names, rope_cos, rope_sin, strict=True)
        ],
    )


def attention(
    graph: GraphWriter,
    qkv: ir.Value,
    past: tuple[ir.Value, ir.Value],
    present: tuple[ir.Value, ir.Value],
    shared: AttentionInputs,
    layer: DecoderLayer,
    decoder: Decoder,
    name: str,
) -> ir.Value:
    """softmax(scale · q kᵀ) v, causal, with rotary positions: [batch, sequence, num_heads · head_dim].

    qkv [batch, sequence, (num_heads + 2 num_kv_heads) · head_dim] holds q, k, v side by side; past and present are
    key and value, [batch, num_kv_heads, past_sequence or total_sequence, a row of `cache_row`].
    """
    config = decoder.config
    output = ir.val(name, graph.float_type, ("batch", "sequence", config.num_heads * config.head_dim))
    lengths = [shared.seqlens_k, shared.total_sequence_length]
    tables = shared.rotary[layer.rotary]
    if decoder.attention_op != "GroupQueryAttention":
        inputs = [qkv, *past, *lengths, shared.position_ids, *tables]
        return kv_attention(graph, inputs, output, present, layer, decoder)
    rotary = [*tables, shared.position_ids]
    graph.node(
        "GroupQueryAttention",
        [qkv, None, None, *past, *lengths, *rotary],
        [output, *present],
        name,
        "com.microsoft",
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        do_rotary=1,
        scale=config.attention_scale,
        local_window_size=layer.window or -1,
    )
    return output
