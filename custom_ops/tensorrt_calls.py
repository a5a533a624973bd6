"""What a plugin in Python knows of its op: the shapes of its outputs, and how to call the kernels. No TensorRT here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from specquant.custom_ops import library_cuda, library_cuda_attention, library_cuda_branch
from specquant.custom_ops.library_cuda import Attention, Branch, Problem
from specquant.custom_ops.schema import Op

Shapes = Sequence[Sequence[int]]
Scaled = Callable[[Any, int, int], Any]  # dimension, times, over -> dimension · times / over


class Call(Protocol):
    """Calls of one op with these attributes. Shapes and addresses are of its inputs, in the schema's order."""

    def __init__(self, op: Op, attributes: dict[str, Any]) -> None: ...

    def output_shapes(self, inputs: Sequence[Sequence[Any]], scaled: Scaled) -> list[list[Any]]:
        """Of dimensions of any kind, which only `scaled` changes."""

    def aliased_input(self, output: int) -> int:
        """The input whose memory an output is; −1 for none."""

    def workspace(self, shapes: Shapes, half: bool) -> int:
        """Bytes that suffice for these shapes and smaller ones; needs no GPU. half: x, or qkv, is float16."""

    def run(
        self, shapes: Shapes, half: bool, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue; workspace is aligned to 256 bytes. Raises SpecQuantError."""


class MatMulCall:
    """`SpecQuantMatMul` or `Int4ResidualMatMul`; all columns of a branch are used."""

    def __init__(self, op: Op, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self.at = {tensor.name: index for index, tensor in enumerate(op.inputs)}

    def output_shapes(self, inputs: Sequence[Sequence[Any]], scaled: Scaled) -> list[list[Any]]:
        outputs = inputs[self.at["scales"]][0]
        return [[*inputs[0][:-1], scaled(outputs, 1, 2) if self.attributes["gate"] else outputs]]

    def aliased_input(self, output: int) -> int:
        return -1

    def workspace(self, shapes: Shapes, half: bool) -> int:
        return library_cuda.workspace_bound(self._problem(shapes, half))

    def run(
        self, shapes: Shapes, half: bool, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        problem = self._problem(shapes, half)
        unused = {"rank"} | (set() if problem.basis_rank else {"basis", "coef"})
        residual = shapes[self.at["residual"]]
        if len(residual) != len(shapes[0]) or residual[-1] != problem.out_features:  # the dummy of one element
            unused.add("residual")
        for name in self.at.keys() - unused:
            setattr(problem, name, inputs[self.at[name]])
        problem.y = outputs[0]
        library_cuda.run(problem, workspace, library_cuda.workspace_bound(problem), stream)

    def _problem(self, shapes: Shapes, half: bool) -> Problem:
        *leading, n = shapes[0]
        rank = shapes[self.at["basis"]][1] if "basis" in self.at else 0
        problem = Problem(tokens=int(np.prod(leading, dtype=np.int64)), half=half, wide_sums=1)
        problem.in_features = n
        problem.out_features = shapes[self.at["scales"]][0]
        problem.basis_rank = problem.rank = rank
        for name, value in self.attributes.items():
            setattr(problem, name, value)
        return problem


class BranchCall:
    """`SpectralBranch`; all columns are used."""

    def __init__(self, op: Op, attributes: dict[str, Any]) -> None:
        pass

    def output_shapes(self, inputs: Sequence[Sequence[Any]], scaled: Scaled) -> list[list[Any]]:
        x, basis, coef = inputs[:3]
        return [[*x[:-1], coef[1]], [*x[:-1], basis[1]]]

    def aliased_input(self, output: int) -> int:
        return -1

    def workspace(self, shapes: Shapes, half: bool) -> int:
        return library_cuda_branch.branch_workspace(self._problem(shapes, half))

    def run(
        self, shapes: Shapes, half: bool, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        problem = self._problem(shapes, half)
        problem.x, problem.basis, problem.coef = inputs[:3]
        problem.y, problem.low = outputs
        library_cuda_branch.run_branch(problem, workspace, stream)

    def _problem(self, shapes: Shapes, half: bool) -> Branch:
        (*leading, n), (r, m) = shapes[0], shapes[2]
        return Branch(int(np.prod(leading, dtype=np.int64)), n, m, r, r, half)


class AttentionCall:
    """`Int4KVAttention` or `HalfKVAttention`, whose present cache is the past one: it has room for the new tokens."""

    def __init__(self, op: Op, attributes: dict[str, Any]) -> None:
        self.attributes = {"hadamard": 0, "clip": 1.0} | attributes
        self.names = [tensor.name for tensor in op.inputs]

    def output_shapes(self, inputs: Sequence[Sequence[Any]], scaled: Scaled) -> list[list[Any]]:
        qkv, *past = inputs[:3]
        y = [*qkv[:-1], scaled(qkv[-1], self.attributes["num_heads"], self._heads())]
        return [y, *(list(cache) for cache in past)]

    def aliased_input(self, output: int) -> int:
        return output if output else -1

    def workspace(self, shapes: Shapes, half: bool) -> int:
        return library_cuda_attention.attention_bound(self._problem(shapes, half))

    def run(
        self, shapes: Shapes, half: bool, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        problem = self._problem(shapes, half)
        for name, address in zip(self.names, inputs, strict=True):
            if name != "total_sequence_length":  # at most the rows of the cache, which are all that matters
                setattr(problem, name, address)
        problem.y, problem.present_key, problem.present_value = outputs
        library_cuda_attention.run_attention(problem, workspace, stream)

    def _heads(self) -> int:
        return int(self.attributes["num_heads"] + 2 * self.attributes["kv_num_heads"])

    def _problem(self, shapes: Shapes, half: bool) -> Attention:
        (batch, sequence, width), past, cos = shapes[0], shapes[1], shapes[self.names.index("cos")]
        problem = Attention(batch=batch, sequence=sequence, head_dim=width // self._heads(), half=half)
        problem.past_rows = problem.present_rows = past[2]
        problem.context, problem.rotary = cos
        problem.half_cache = "key_offset" not in self.names
        problem.window = self.attributes["local_window_size"]
        for name in ("num_heads", "kv_num_heads", "scale", "hadamard", "clip"):
            setattr(problem, name, self.attributes[name])
        return problem


CALLS: dict[str, type[Call]] = {
    "SpecQuantMatMul": MatMulCall,
    "Int4ResidualMatMul": MatMulCall,
    "SpectralBranch": BranchCall,
    "Int4KVAttention": AttentionCall,
    "HalfKVAttention": AttentionCall,
}
