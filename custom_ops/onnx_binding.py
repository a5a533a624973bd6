"""The op set in the onnx package: schemas for its checker, kernels for its reference evaluator. Needs onnx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, TensorShapeProto, TypeProto, defs, shape_inference
from onnx.reference.op_run import OpRun

from specquant.custom_ops import attention, reference
from specquant.custom_ops.schema import DOMAIN, FLOAT, FLOAT_TYPES, OPS, VERSION, Op, Tensor

Dims = list[TensorShapeProto.Dimension]


def register_schemas() -> None:
    """Make onnx.checker and shape inference know the ops, even in a model without their functions. Idempotent."""
    for op in OPS.values():
        if not defs.has(op.name, DOMAIN):
            defs.register_schema(_schema(op))


def reference_ops() -> list[type[OpRun]]:
    """For `onnx.reference.ReferenceEvaluator(model, new_ops=reference_ops())`: each op, run by reference.py."""
    runs: dict[str, Callable[..., Any]] = {
        "SpectralBranch": reference.spectral_branch,
        "Int4ResidualMatMul": reference.int4_residual_matmul,
        "SpecQuantMatMul": reference.specquant_matmul,
        "Int4KVAttention": attention.int4_kv_attention,
        "HalfKVAttention": attention.half_kv_attention,
    }
    return [_op_run(op, runs[op.name]) for op in OPS.values()]


def _schema(op: Op) -> defs.OpSchema:
    def parameter(tensor: Tensor) -> defs.OpSchema.FormalParameter:
        kind = tensor.types[0] if tensor.types == (FLOAT,) else f"T_{tensor.name}"
        return defs.OpSchema.FormalParameter(tensor.name, kind, tensor.doc)

    constraints: dict[str, tuple[str, ...]] = {FLOAT: FLOAT_TYPES}
    others = (tensor for tensor in (*op.inputs, *op.outputs) if tensor.types != (FLOAT,))
    constraints |= {f"T_{tensor.name}": tensor.types for tensor in others}
    schema = defs.OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        op.doc,
        inputs=[parameter(tensor) for tensor in op.inputs],
        outputs=[parameter(tensor) for tensor in op.outputs],
        type_constraints=[(kind, [f"tensor({t})" for t in types], "") for kind, types in constraints.items()],
        attributes=[
            defs.OpSchema.Attribute(a.name, onnx.helper.make_attribute(a.name, a.default), a.doc) for a in op.attributes
        ],
    )
    schema.set_type_and_shape_inference_function(lambda context: _infer(op, context))
    return schema


def _infer(op: Op, context: shape_inference.InferenceContext) -> None:
    """Give each output its element type (x's, if a float), and the sizes that the inputs give its symbols.

    Raises InferenceError if two inputs disagree on a size.
    """
    sizes: dict[str, TensorShapeProto.Dimension] = {}
    leading: Dims | None = None
    for index, tensor in enumerate(op.inputs[: context.get_num_inputs()]):
        kind = context.get_input_type(index)
        if kind is None or not kind.tensor_type.HasField("shape"):
            continue
        dims = list(kind.tensor_type.shape.dim)
        symbols = tensor.shape
        if tensor.optional and [dim.dim_value for dim in dims] == [1]:  # a dummy
            continue
        if symbols[:1] == ("...",):
            leading = dims[:-1] if index == 0 else leading
            symbols, dims = symbols[1:], dims[-1:]
        if len(dims) != len(symbols):
            raise shape_inference.InferenceError(f"{op.name}: {tensor.name} has {len(dims)} axes, not {len(symbols)}")
        for symbol, dim in zip(symbols, dims, strict=True):
            known = sizes.setdefault(symbol, dim)
            if known.HasField("dim_value") and dim.HasField("dim_value") and known.dim_value != dim.dim_value:
                raise shape_inference.InferenceError(
                    f"{op.name}: {symbol} is {dim.dim_value} in {tensor.name} but {known.dim_value} before it"
                )
    x = context.get_input_type(0)
    unknown = TensorShapeProto.Dimension()
    for index, tensor in enumerate(op.outputs):
        output, symbols = TypeProto(), tensor.shape
        output.tensor_type.elem_type = _element_type(tensor, x)
        if symbols[0] == "...":
            symbols = symbols[1:] if leading is not None else ()
        if symbols:
            dims = [sizes.get(symbol, unknown) for symbol in symbols]
            if dims and _is_gated(op, context):
                dims = [_half(dims[0])]
            output.tensor_type.shape.dim.extend([*(leading or []), *dims])
        context.set_output_type(index, output)


def _is_gated(op: Op, context: shape_inference.InferenceContext) -> bool:
    if not any(attribute.name == "gate" for attribute in op.attributes):
        return False
    given = context.get_attribute("gate")
    return given is not None and given.i != 0


def _half(dim: TensorShapeProto.Dimension) -> TensorShapeProto.Dimension:
    half = TensorShapeProto.Dimension()
    if dim.HasField("dim_value"):
        half.dim_value = dim.dim_value // 2
    return half


def _element_type(tensor: Tensor, x: TypeProto) -> int:
    if tensor.types == (FLOAT,):
        return int(x.tensor_type.elem_type)
    return int(TensorProto.DataType.Value(tensor.types[0].upper()))


def _op_run(op: Op, run: Callable[..., Any]) -> type[OpRun]:
    defaults = {attribute.name: attribute.default for attribute in op.attributes}

    def _run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        given = {name: value for name, value in attributes.items() if value is not None}
        result = run(*inputs, **(defaults | given))
        return result if isinstance(result, tuple) else (result,)

    return type(op.name, (OpRun,), {"op_domain": DOMAIN, "op_schema": _schema(op), "_run": _run})
