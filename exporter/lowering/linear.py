"""The quantised linears as standard operators (profile `portable`)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.custom_ops.packing import unpack_group_scales, unpack_int4
from specquant.custom_ops.schema import OPS
from specquant.exporter.lowering.context import Attributes, Lowering, attributes, dims
from specquant.exporter.lowering.surroundings import add_residual, gated, prologue


def portable_linear(low: Lowering, node: ir.Node) -> ir.Value:
    """y = x̃ · Ŵ + (x̃ · B) · C′ + bias of `SpecQuantMatMul` or `Int4ResidualMatMul`, activations in floating point.

    Ŵ stays 4 bits, behind a block-wise DequantizeLinear. What subtract takes from the weights' product is put into
    the branch, which is the same as long as activations are not rounded: C′ = C − subtract · Bᵀ Ŵ.
    """
    at, graph, name = _operands(node), low.graph, str(node.name)
    x, m = prologue(low, node, at["norm"]), int(dims(node.inputs[at["scales"]])[0])
    n, shape = int(dims(x)[-1]), (*dims(node.outputs[0])[:-1], m)
    x = _rotated(low, x, int(attributes(node).get("hadamard", 0)), n, name)
    y = graph.op("MatMul", [x, _weights(low, node, at, n, m)], f"{name}.residual", shape)
    if "basis" in at:
        basis, coef = _branch(low, node, at, n, m)
        if basis.shape[1]:
            low_shape = (*shape[:-1], basis.shape[1])
            projected = graph.op("MatMul", [x, graph.floats(f"{name}.basis", basis)], f"{name}.low", low_shape)
            branch = graph.op("MatMul", [projected, graph.floats(f"{name}.coef", coef)], f"{name}.branch", shape)
            y = graph.op("Add", [y, branch], f"{name}.sum", shape)
    bias = low.array(node, at["bias"])
    if bias.any():
        y = graph.op("Add", [y, graph.floats(f"{name}.bias", bias)], f"{name}.biased", shape)
    y = add_residual(low, node, at["residual"], gated(low, node, y))
    y.name = node.outputs[0].name  # of the head: `logits`
    return y


def _operands(node: ir.Node) -> dict[str, int]:
    """Index of each of the op's inputs, by the schema's name."""
    return {tensor.name: index for index, tensor in enumerate(OPS[node.op_type].inputs)}


def _weights(low: Lowering, node: ir.Node, at: dict[str, int], n: int, m: int) -> ir.Value:
    """Ŵ [n, m]: int4, dequantised by DequantizeLinear in the graph."""
    graph, name, group = low.graph, str(node.name), int(attributes(node).get("group_size", 0))
    packed, products = low.constant(node.inputs[at["qweight"]]), _products(low, node, at)
    q = graph.lazy(
        f"{name}.weight_int4",
        ir.DataType.INT4,
        (n, m),
        lambda: unpack_int4(packed.numpy(), n, m).astype(ml_dtypes.int4),
    )
    extra: Attributes = {"axis": 0, "block_size": group} if group else {"axis": 1}
    scale = graph.floats(f"{name}.scales", products if group else products[0])
    return graph.op("DequantizeLinear", [q, scale], f"{name}.weight", (n, m), **extra)


def _products(low: Lowering, node: ir.Node, at: dict[str, int]) -> NDArray[np.float32]:
    """[G, m]: what a level of each group is worth, exactly; a graph in float16 rounds it, since it has one level."""
    packed, scales = low.array(node, at["group_scales"]), low.array(node, at["scales"])
    return scales.astype(np.float32) * unpack_group_scales(packed, packed.shape[1], len(scales))


def _branch(
    low: Lowering, node: ir.Node, at: dict[str, int], n: int, m: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B float32 [n, r] and C′ float32 [r, m]."""
    basis = low.array(node, at["basis"])[:, : low.rank].astype(np.float32)
    coef = low.array(node, at["coef"])[: low.rank].astype(np.float32)
    if attributes(node).get("subtract", 0):
        products = _products(low, node, at)
        q = unpack_int4(low.array(node, at["qweight"]), n, m)
        groups = len(products)
        # Group by group: Bᵀ Ŵ needs no dequantised copy of all weights.
        parts = zip(np.split(basis, groups), np.split(q, groups), products, strict=True)
        coef = coef - sum((b.T @ w.astype(np.float32)) * s for b, w, s in parts)
    return basis, coef


def _rotated(low: Lowering, x: ir.Value, block: int, n: int, name: str) -> ir.Value:
    """x̃ = x H: runs of `block` features times the orthonormal Hadamard matrix; x itself for 0."""
    if not block:
        return x
    graph, i64 = low.graph, ir.DataType.INT64
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:  # Sylvester's order
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    h = f"hadamard.{block}"
    if h not in low.shared:
        low.shared[h] = graph.floats(h, (matrix / np.sqrt(block)).astype(np.float32))
    leading = dims(x)[:-1]
    lead = low.sizes(x, 0, len(leading), f"{name}.leading")
    split = graph.op("Concat", [lead, low.ints(n // block, block)], f"{name}.split", (len(leading) + 2,), i64, axis=0)
    blocks = graph.op("Reshape", [x, split], f"{name}.blocks", (*leading, n // block, block), allowzero=1)
    product = graph.op("MatMul", [blocks, low.shared[h]], f"{name}.turned", (*leading, n // block, block))
    joined = graph.op("Concat", [lead, low.ints(n)], f"{name}.joined", (len(leading) + 1,), i64, axis=0)
    return graph.op("Reshape", [product, joined], f"{name}.rotated", (*leading, n), allowzero=1)
