"""Random weights for an op of domain `specquant`, and a model that holds that one op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from specquant.custom_ops import reference
from specquant.custom_ops.functions import OPSET, function_protos
from specquant.custom_ops.packing import MOST, pack_group_scales, pack_int4
from specquant.custom_ops.schema import DOMAIN, OPS, VERSION, Op, Tensor

Arrays = dict[str, NDArray[Any]]
REFERENCE: dict[str, Callable[..., Any]] = {
    "SpectralBranch": reference.spectral_branch,
    "Int4ResidualMatMul": reference.int4_residual_matmul,
    "SpecQuantMatMul": reference.specquant_matmul,
}


def random_weights(rng: np.random.Generator, op: str, n: int, m: int, rank: int, group_size: int = 0) -> Arrays:
    """Operands of `op` but x, in order: weights of n in-features and m out-features, a branch of `rank`.

    With `random_input`, low and x − low · Bᵀ are exact in float32, so no order of summation moves a level.
    """
    q, groups = rng.integers(-8, 8, (n, m), dtype=np.int8), n // (group_size or n)
    of_groups = rng.integers(1, MOST + 1, (groups, m), dtype=np.int8) if groups > 1 else np.ones((1, m), np.int8)
    arrays = {
        "basis": rng.choice([-0.25, 0, 0.25], (n, rank)).astype(np.float16),
        "coef": rng.standard_normal((rank, m)).astype(np.float16),
        "rank": np.array([rank], np.int64),
        "qweight": pack_int4(q),
        "group_scales": pack_group_scales(of_groups),
        "scales": rng.uniform(0.005, 0.03, m).astype(np.float16),
        "bias": rng.standard_normal(m).astype(np.float32),
    }
    return {tensor.name: arrays[tensor.name] for tensor in operands(OPS[op]) if tensor.name != "x"}


def operands(op: Op) -> tuple[Tensor, ...]:
    """Inputs that are never dummies: all but norm and residual."""
    return tuple(tensor for tensor in op.inputs if not tensor.optional)


def random_input(rng: np.random.Generator, shape: tuple[int, ...], float_type: Any = np.float32) -> NDArray[Any]:
    """Multiples of 1/8 in −4…4: a Hadamard transform of 16, 64 or 256 of them is exact in any order, too."""
    return (rng.integers(-32, 33, shape) / 8).astype(float_type)


def op_model(op: str, n: int, weights: Arrays, float_type: Any, attributes: dict[str, Any]) -> onnx.ModelProto:
    """x [a, b, n] → the outputs of one `op` node with its function; `rank` is an overridable initialiser.

    norm and residual are dummies, unless they are among the weights.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(float_type))
    dummies = {"norm": np.zeros(1, np.float32), "residual": np.zeros(1, float_type)}
    weights = {tensor.name: weights.get(tensor.name, dummies.get(tensor.name)) for tensor in OPS[op].inputs[1:]}
    sizes: dict[str, int] = {}
    parts = 2 if attributes.get("gate") else 1
    for tensor in operands(OPS[op])[1:]:
        sizes |= dict(zip(tensor.shape, weights[tensor.name].shape, strict=True))
    inputs = [helper.make_tensor_value_info("x", kind, ["a", "b", n])]
    if "rank" in weights:
        inputs.append(helper.make_tensor_value_info("rank", TensorProto.INT64, [1]))
    outputs = [
        helper.make_tensor_value_info(tensor.name, kind, ["a", "b", sizes[tensor.shape[-1]] // parts])
        for tensor in OPS[op].outputs
    ]
    names = [tensor.name for tensor in OPS[op].inputs], [tensor.name for tensor in OPS[op].outputs]
    node = helper.make_node(op, *names, domain=DOMAIN, **attributes)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    return helper.make_model(
        helper.make_graph([node], "one_op", inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=function_protos({op}),
        ir_version=11,
    )


def branch_graph(rng: np.random.Generator, path: Path, float_type: Any) -> Path:
    """Write x [batch, 16, 64] → y and low of one SpectralBranch, without its function, which TensorRT would take."""
    kind, op = helper.np_dtype_to_tensor_dtype(np.dtype(float_type)), "SpectralBranch"
    weights = random_weights(rng, op, 64, 40, 5)
    node = helper.make_node(op, ["x", *weights], ["y", "low"], "branch", domain=DOMAIN)
    widths = {"x": 64, "y": 40, "low": 5}
    x, *outputs = (helper.make_tensor_value_info(name, kind, ["batch", 16, width]) for name, width in widths.items())
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "branch", [x], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path
