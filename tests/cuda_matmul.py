"""A call of the CUDA kernels' matmul: its arrays, the workspace, and what came of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda
from tests.cuda_arrays import POISON, DeviceArray, capability
from tests.ops import Arrays


class Call:
    """A call of the library: its arrays, the workspace, and what came of it."""

    def __init__(
        self,
        x: NDArray[Any],
        weights: Arrays,
        path: str | None = None,
        offsets: dict[str, int] | None = None,
        **rest: Any,
    ) -> None:
        offsets = offsets or {}
        operands: dict[str, Any] = {k: DeviceArray(v, offsets.get(k, 0)) for k, v in weights.items() if k != "rank"}
        if "rank" in weights:
            operands["rank"] = int(weights["rank"][0])
        self.x = DeviceArray(x, offsets.get("x", 0))
        self.layout = library_cuda.layout(self.x, **operands, **rest)
        self.space = DeviceArray(np.full(self.layout.bytes, POISON, np.uint8))
        m = weights["scales"].shape[0] // (2 if rest.get("gate") else 1)
        # A row more, which nobody may write.
        y = DeviceArray(np.full((len(x) + 1, m), np.nan, x.dtype), offsets.get("y", 0))
        view = _Rows(y, len(x))
        library_cuda.matmul(self.x, view, self.space, path=path, **operands, **rest)
        whole = y.numpy()
        assert np.isnan(whole[len(x) :]).all(), "wrote past the end of y"
        self.y = whole[: len(x)]

    def read(self, name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array of the workspace."""
        start = getattr(self.layout, name)
        assert start >= 0
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.space.numpy()[start : start + size].view(dtype).reshape(shape)


class _Rows:
    """The first rows of an array."""

    def __init__(self, array: Any, rows: int) -> None:
        self.shape = (rows, *array.shape[1:])
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "shape": self.shape, "strides": None}


def paths(
    tokens: int, groups: tuple[int, int, int], bits: int, m: int = 8, rank: int = 0, columns: int = 0
) -> list[str | None]:
    """The paths that take these sizes, `columns` being the basis's; None, the library's own choice, always."""
    group_size, act_group, n = groups
    if m % 8 or any(size % 64 for size in (group_size, act_group if bits < 16 else 0) if size != n):
        return [None, "any"]
    whole = not act_group or act_group == n
    limit = 16 if bits < 16 and whole else 32
    fits = capability() == (9, 0) and bits < 16 and n % 128 == 0 and m % 16 == 0 and rank <= 64
    wgmma = ["wgmma_small", "wgmma_large"] if fits else []
    wgmma += ["wgmma_wide"] if fits and whole and group_size not in (0, n) and rank <= 32 else []
    few = [] if tokens > limit else ["matvec", "cluster"] if capability() == (9, 0) and columns <= 64 else ["matvec"]
    return [None, "any", "gemm_small", "gemm_large", *wgmma, *few]
