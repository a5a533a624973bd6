"""What the lowering of every node shares: the graph that grows, and where the old graph's values went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.graph.writer import GraphWriter

Attributes = dict[str, Any]


@dataclass
class Lowering:
    """A new graph from an old one. `values` maps each old value that was needed so far to the new one.

    rank: columns of every spectral branch that are kept, None for all. capacity: tokens in a row of the KV cache.
    """

    graph: GraphWriter
    rank: int | None
    capacity: int
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    shared: dict[str, ir.Value] = field(default_factory=dict)  # values made once for all layers

    def new(self, value: ir.Value | None) -> ir.Value | None:
        """The new graph's counterpart of an old value; initialisers are taken over when first asked for."""
        if value is None:
            return None
        if value not in self.values:
            self.values[value] = self.graph.initializer(self.constant(value))
        return self.values[value]

    def input(self, node: ir.Node, index: int) -> ir.Value:
        value = self.new(node.inputs[index])
        assert value is not None, f"{node.name} lacks input {index}"
        return value

    def constant(self, value: ir.Value | None) -> ir.TensorProtocol:
        """The tensor of an initialiser. Raises SpecQuantError for a value that is computed."""
        if value is None or value.const_value is None:
            name = None if value is None else value.name
            raise SpecQuantError(f"{name} of the artifact's graph is no constant: re-export the model")
        return value.const_value

    def array(self, node: ir.Node, index: int) -> NDArray[Any]:
        return self.constant(node.inputs[index]).numpy()

    def once(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initialiser that several nodes share."""
        if name not in self.shared:
            self.shared[name] = self.graph.tensor(name, array)
        return self.shared[name]

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 vector of these numbers."""
        return self.once("ints." + "_".join(str(n).replace("-", "m") for n in numbers), np.array(numbers, np.int64))

    def sizes(self, x: ir.Value, start: int, end: int, name: str) -> ir.Value:
        """Dimensions start … end − 1 of x, i64."""
        return self.graph.op("Shape", [x], name, (end - start,), ir.DataType.INT64, start=start, end=end)


def attributes(node: ir.Node) -> Attributes:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def dims(value: ir.Value | None) -> Sequence[Any]:
    """The shape that the artifact's graph records of a value: a number or a symbol an axis."""
    if value is None or value.shape is None:
        raise SpecQuantError("the artifact's graph records no shapes: re-export the model")
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]
