"""Root-mean-square normalisation, of hidden states and of attention heads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.exporter.decoder import DecoderConfig, DecoderLayer
from specquant.exporter.graph.writer import GraphWriter


def rms_norm(graph: GraphWriter, x: ir.Value, weight: NDArray[np.float32], epsilon: float, name: str) -> ir.Value:
    """x / √(mean(x²) + epsilon) · weight over the last axis, computed in float32; x [batch, sequence, …, features]."""
    output = ir.val(name, graph.float_type, x.shape)
    graph.node(
        "RMSNormalization", [x, graph.floats(f"{name}.weight", weight)], [output], name, axis=-1, epsilon=epsilon
    )
    return output


def head_norms(graph: GraphWriter, qkv: ir.Value, layer: DecoderLayer, config: DecoderConfig, name: str) -> ir.Value:
    """qkv [batch, sequence, (num_heads + 2 num_kv_heads) · head_dim], its q and k heads normalised if `layer` does so.

    In standard operators: ONNX Runtime's GroupQueryAttention has inputs for it, but not on a CPU.
    """
    if layer.q_norm is None or layer.k_norm is None:
        return qkv
    d, counts = config.head_dim, [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    heads_shape = graph.tensor(
        f"{name}.self_attn.heads_shape", np.array([0, 0, sum(counts), d], np.int64)
    )  # 0: as it is
    flat_shape = graph.tensor(f"{name}.self_attn.flat_shape", np.array([0, 0, sum(counts) * d], np.int64))
    sizes = graph.tensor(f"{name}.self_attn.head_counts", np.array(counts, np.int64))

    heads = graph.op("Reshape", [qkv, heads_shape], f"{name}.self_attn.heads", ("batch", "sequence", sum(counts), d))
    parts = zip("qkv", counts, strict=True)
    q, k, v = (ir.val(f"{name}.self_attn.{part}", graph.float_type, ("batch", "sequence", n, d)) for part, n in parts)
    graph.node("Split", [heads, sizes], [q, k, v], f"{name}.self_attn.split_heads", axis=2)
    q = rms_norm(graph, q, layer.q_norm, config.rms_norm_eps, f"{name}.q_norm")
    k = rms_norm(graph, k, layer.k_norm, config.rms_norm_eps, f"{name}.k_norm")
    heads = graph.op(
        "Concat", [q, k, v], f"{name}.self_attn.normed_heads", ("batch", "sequence", sum(counts), d), axis=2
    )
    return graph.op(
        "Reshape", [heads, flat_shape], f"{name}.self_attn.normed_qkv", ("batch", "sequence", sum(counts) * d)
    )
