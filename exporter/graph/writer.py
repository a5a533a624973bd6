"""Collects the nodes and initialisers of a graph; every value gets a name, a type and a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

FloatType = Literal["float32", "float16"]
Dim = int | str


class GraphWriter:
    """The graph as it grows. Floating-point values are of `float_type` unless told otherwise."""

    def __init__(self, float_type: FloatType) -> None:
        self.float_type = ir.DataType.FLOAT if float_type == "float32" else ir.DataType.FLOAT16
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._shared: dict[str, ir.Value] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Append a node that writes `outputs`."""
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=name))

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[Dim],
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output, which takes the node's name, and return that output."""
        output = ir.val(name, dtype or self.float_type, shape)
        self.node(op_type, inputs, [output], name, domain, **attributes)
        return output

    def tensor(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initialiser that holds the array itself, not a copy."""
        return self.initializer(ir.tensor(array, name=name))

    def once(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initialiser that several nodes share."""
        if name not in self._shared:
            self._shared[name] = self.tensor(name, array)
        return self._shared[name]

    def lazy(self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], NDArray[Any]]) -> ir.Value:
        """An initialiser computed only when it is written, so that the model is not in memory twice."""
        return self.initializer(ir.LazyTensor(lambda: ir.tensor(make()), dtype, ir.Shape(shape), name=name))

    def floats(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        """An initialiser of the graph's float type. Raises SpecQuantError if a value does not fit float16."""
        return self.tensor(name, array) if self.float_type == ir.DataType.FLOAT else self.half(name, array)

    def half(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        """An initialiser in float16. Raises SpecQuantError if a value does not fit."""
        limit = float(np.finfo(np.float16).max)
        if array.max() > limit or array.min() < -limit:
            raise SpecQuantError(f"{name} has values beyond {limit:.0f}, float16's largest; export in float32")
        return self.lazy(name, ir.DataType.FLOAT16, array.shape, lambda: array.astype(np.float16))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initialiser that is `tensor`, under its name."""
        value = ir.val(tensor.name, const_value=tensor)
        self.initializers.append(value)
        return value
