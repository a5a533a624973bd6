"""From token ids to the first hidden state, and from the last one to logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.exporter.graph.linear import quant_linear
from specquant.exporter.graph.surroundings import RmsNorm
from specquant.exporter.graph.writer import GraphWriter
from specquant.exporter.head import DIGIT, head_linear

_END = np.iinfo(np.int64).max


def embed(
    graph: GraphWriter, input_ids: ir.Value, embedding: NDArray[np.float32], scale: float
) -> tuple[ir.Value, ir.Value]:
    """scale · rows of embedding [vocab, hidden] for input_ids: [batch, sequence, hidden], and the table for a tied
    head, which is not scaled."""
    table = graph.floats("model.embed_tokens.weight", embedding)
    shape = ("batch", "sequence", embedding.shape[1])
    rows = graph.op("Gather", [table, input_ids], "model.embed_tokens", shape, axis=0)
    return _scaled(graph, rows, scale), table


def embed_half(graph: GraphWriter, input_ids: ir.Value, embedding: NDArray[np.float32], scale: float) -> ir.Value:
    """`embed` of a table in float16, beside a head that has its own."""
    name, shape = "model.embed_tokens", ("batch", "sequence", embedding.shape[1])
    table = graph.half(f"{name}.weight", embedding)
    if graph.float_type == table.dtype:
        return _scaled(graph, graph.op("Gather", [table, input_ids], name, shape, axis=0), scale)
    rows = graph.op("Gather", [table, input_ids], f"{name}.half", shape, table.dtype, axis=0)
    return _scaled(graph, graph.op("Cast", [rows], name, shape, to=graph.float_type), scale)


def _scaled(graph: GraphWriter, rows: ir.Value, scale: float) -> ir.Value:
    if scale == 1:
        return rows
    factor = graph.floats("model.embed_tokens.scale", np.array(scale, np.float32))
    return graph.op("Mul", [rows, factor], "model.embed_tokens.scaled", rows.shape)


def last_positions(graph: GraphWriter, x: ir.Value, keep: ir.Value, hidden: int) -> ir.Value:
    """The last `keep` i64[1] positions of x [batch, sequence, hidden], or all of them for 0."""
    end, axis = (graph.tensor(f"logits_to_keep.{n}", np.array([v], np.int64)) for n, v in (("end", _END), ("axis", 1)))
    # −keep as (length − keep) − length: what starts at a shape, ONNX Runtime computes on the host where all else is on
    # a GPU. A Neg would be a node of the GPU, and every run would wait for it.
    i64 = ir.DataType.INT64
    length = graph.op("Shape", [x], "logits_to_keep.length", (1,), i64, start=1, end=2)
    rest = graph.op("Sub", [length, keep], "logits_to_keep.rest", (1,), i64)
    start = graph.op("Sub", [rest, length], "logits_to_keep.start", (1,), i64)
    return graph.op("Slice", [x, start, end, axis], "logits_to_keep.slice", ("batch", "kept", hidden))


def lm_head(graph: GraphWriter, x: ir.Value, table: ir.Value, logits: ir.Value) -> None:
    """Write logits [batch, kept, vocab] = x · tableᵀ; x [batch, kept, hidden], table [vocab, hidden].

    FusedMatMul reads a tied table as it lies. MatMul would fold a transposed copy of it, and Gemm, being 2-D,
    needs a Reshape that copies all logits.
    """
    graph.node("FusedMatMul", [x, table], [logits], "lm_head", "com.microsoft", transB=1)


def lm_head_int(
    graph: GraphWriter, x: ir.Value, weights: NDArray[np.float32], bits: int, logits: ir.Value, norm: RmsNorm
) -> None:
    """`lm_head` of normed x and weights [vocab, hidden] at 8 or 4 bits, as one `Int4ResidualMatMul`
    (`head.head_linear`)."""
    entry = head_linear(weights, bits)
    if bits == 8:
        shape = ("batch", "kept", 2 * weights.shape[1])
        x = graph.op("Concat", [x, x], "lm_head.twice", shape, axis=-1)
        # Of x twice over the mean is the same. The low digits' half is a power of two smaller, which rounds nothing.
        norm = replace(norm, weight=np.concatenate([norm.weight, norm.weight / np.float32(DIGIT)]))
    quant_linear(graph, x, entry, None, logits, norm)
