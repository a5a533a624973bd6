"""A decoder as one ONNX model (docs/formats.md, "Graph inputs and outputs")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from specquant.custom_ops.functions import OPSET, function_protos
from specquant.custom_ops.schema import DOMAIN, VERSION
from specquant.exporter.decoder import Decoder, DecoderLayer, Linear, QuantLinear
from specquant.exporter.graph.attention import AttentionInputs, attention, attention_inputs
from specquant.exporter.graph.head import embed, embed_half, last_positions, lm_head, lm_head_int
from specquant.exporter.graph.kv_attention import cache_row
from specquant.exporter.graph.linear import linear
from specquant.exporter.graph.norm import head_norms
from specquant.exporter.graph.surroundings import Gate, RmsNorm
from specquant.exporter.graph.writer import FloatType, GraphWriter

IR_VERSION = 11  # the first that knows opset 23
I64 = ir.DataType.INT64
KeyValue = tuple[ir.Value, ir.Value]


def build_model(decoder: Decoder, float_type: FloatType, metadata: dict[str, str]) -> ir.Model:
    """The graph of `decoder`, with floats of `float_type` and `metadata` as the model's metadata_props.

    Weights are shared with the decoder, and packed or cast only when the model is written. Raises SpecQuantError
    if groups do not fit a linear, or a weight does not fit float16.
    """
    config, graph = decoder.config, GraphWriter(float_type)
    input_ids = ir.val("input_ids", I64, ("batch", "sequence"))
    attention_mask = ir.val("attention_mask", I64, ("batch", "total_sequence"))
    position_ids = ir.val("position_ids", I64, ("batch", "sequence"))
    past = [_cache(decoder, graph, f"past_key_values.{i}", "past_sequence") for i in range(config.num_layers)]
    present = [_cache(decoder, graph, f"present.{i}", "total_sequence") for i in range(config.num_layers)]
    logits = ir.val("logits", graph.float_type, ("batch", "kept", config.vocab_size))
    rank = _rank(decoder, graph)
    keep = graph.tensor("logits_to_keep", np.zeros(1, np.int64))

    shared = attention_inputs(graph, attention_mask, position_ids, decoder.rope_cos, decoder.rope_sin)
    if config.head_bits == 16:
        x, table = embed(graph, input_ids, decoder.embedding, config.embedding_scale)
    else:
        x = embed_half(graph, input_ids, decoder.embedding, config.embedding_scale)
    for i, layer in enumerate(decoder.layers):
        x = _block(graph, x, decoder, layer, f"model.layers.{i}", past[i], present[i], shared, rank)
    x = last_positions(graph, x, keep, config.hidden_size)
    norm = RmsNorm("model.norm", decoder.final_norm, config.rms_norm_eps)
    if config.head_bits != 16:
        head = decoder.embedding if decoder.lm_head is None else decoder.lm_head
        lm_head_int(graph, x, head, config.head_bits, logits, norm)
    else:
        x = norm.nodes(graph, x)
        if decoder.lm_head is not None:
            table = graph.floats("lm_head.weight", decoder.lm_head)
        lm_head(graph, x, table, logits)

    inputs = [input_ids, attention_mask, position_ids, *(value for pair in past for value in pair)]
    outputs = [logits, *(value for pair in present for value in pair)]
    used = {node.op_type for node in graph.nodes if node.domain == DOMAIN}
    opsets = {"": OPSET, "com.microsoft": 1} | ({DOMAIN: VERSION} if used else {})
    return ir.Model(
        ir.Graph(
            [*inputs, keep, *([rank] if rank else [])],
            outputs,
            nodes=graph.nodes,
            initializers=graph.initializers,
            opset_imports=opsets,
            name=config.family,
        ),
        ir_version=IR_VERSION,
        producer_name="specquant",
        functions=[ir.from_proto(function) for function in function_protos(used)],
        metadata_props=metadata,
    )


def _cache(decoder: Decoder, graph: GraphWriter, name: str, length: str) -> KeyValue:
    row, dtype = cache_row(graph, decoder)
    shape = ("batch", decoder.config.num_kv_heads, length, row)
    key, value = (ir.val(f"{name}.{part}", dtype, shape) for part in ("key", "value"))
    return key, value


def _rank(decoder: Decoder, graph: GraphWriter) -> ir.Value | None:
    """`rank` i64[1], by default the widest branch's, which leaves every branch whole; None without branches."""
    linears = (entry for layer in decoder.layers for entry in layer.linears if isinstance(entry, QuantLinear))
    ranks = [entry.basis.shape[1] for entry in linears if entry.basis is not None]
    return graph.tensor("rank", np.array([max(ranks)], np.int64)) if ranks else None


def _block(
    graph: GraphWriter,
    x: ir.Value,
    decoder: Decoder,
    layer: DecoderLayer,
    name: str,
    past: KeyValue,
    present: KeyValue,
    shared: AttentionInputs,
    rank: ir.Value | None,
) -> ir.Value:
    """x + norm(o(attention(qkv(norm(x))))), then x + norm(mlp(norm(x))); x [batch, sequence, hidden]."""
    config = decoder.config

    def norm(field: str) -> RmsNorm | None:
        weight = layer.norms.get(field)
        return None if weight is None else RmsNorm(f"{name}.{field}", weight, config.rms_norm_eps)

    def add(x: ir.Value, h: ir.Value, entry: Linear, after: RmsNorm | None) -> ir.Value:
        """x + norm(linear of h): one node, unless there is a norm."""
        if after is None:
            return linear(graph, h, entry, rank, residual=x)
        h = after.nodes(graph, linear(graph, h, entry, rank))
        return graph.op("Add", [x, h], f"{after.name}.residual", x.shape)

    qkv = linear(graph, x, layer.qkv, rank, norm("input_norm"))
    qkv = head_norms(graph, qkv, layer, config, name)
    h = attention(graph, qkv, past, present, shared, layer, decoder, f"{name}.self_attn")
    x = add(x, h, layer.o, norm("attention_output_norm"))
    h = linear(graph, x, layer.gate_up, rank, norm("mlp_norm"), gate=Gate(f"{name}.mlp", config.activation))
    return add(x, h, layer.down, norm("mlp_output_norm"))
