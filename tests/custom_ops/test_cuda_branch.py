"""`SpectralBranch` by the CUDA kernels against the reference: on a GPU, or compiled for the CPU (docs/cuda.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda_branch, reference
from specquant.custom_ops.errors import SpecQuantError
from tests.cuda_arrays import POISON, DeviceArray, require_kernels

require_kernels()
# Tokens, N, M and r: of tensor cores in one share of the features and in several, and odd ones that they do not take.
SIZES = [(1, 256, 64, 32), (37, 1160, 72, 31), (33, 640, 257, 64), (130, 64, 8, 1), (5, 37, 19, 6), (3, 128, 130, 70)]


def computed(
    x: NDArray[Any], basis: NDArray[Any], coef: NDArray[Any], rank: int, offset: int = 0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """y and low, in a dirty workspace; one row more of each, which nobody may write. offset: bytes off alignment."""
    tokens, r, m = len(x), *coef.shape
    arrays = [DeviceArray(array, offset) for array in (x, basis, coef)]
    outputs = [DeviceArray(np.full((tokens + 1, columns), np.nan, x.dtype), offset) for columns in (m, r)]
    problem = library_cuda_branch.branch_problem(*arrays, *(_Rows(array, tokens) for array in outputs), rank)
    space = DeviceArray(np.full(library_cuda_branch.branch_workspace(problem), POISON, np.uint8))
    library_cuda_branch.branch(problem, space)
    y, low = (array.numpy() for array in outputs)
    assert np.isnan(y[tokens:]).all()
    assert np.isnan(low[tokens:]).all()
    return y[:tokens], low[:tokens]


class _Rows:
    def __init__(self, array: Any, rows: int) -> None:
        interface = array.__cuda_array_interface__
        self.__cuda_array_interface__ = interface | {"shape": (rows, *interface["shape"][1:])}


def operands(rng: np.random.Generator, n: int, m: int, r: int) -> tuple[NDArray[Any], NDArray[Any]]:
    basis, _ = np.linalg.qr(rng.standard_normal((n, r)))
    return basis.astype(np.float16), rng.standard_normal((r, m)).astype(np.float16)


def close(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    size = np.abs(expected.astype(np.float32)).max(initial=0)
    bound = 1e-5 if expected.dtype == np.float32 else 2**-10
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * size)


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_equals_the_reference(rng: np.random.Generator, sizes: tuple[int, int, int, int], float_type: Any) -> None:
    tokens, n, m, r = sizes
    basis, coef = operands(rng, n, m, r)
    x = (rng.standard_normal((tokens, n)) * 8).astype(float_type)
    for rank in {0, 1, r // 2, r}:
        y, low = computed(x, basis, coef, rank)
        wanted_y, wanted_low = reference.spectral_branch(x, basis, coef, np.array([rank]))
        close(y, wanted_y)
        close(low, wanted_low)
        assert not low[:, rank:].any()


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_arrays_off_their_alignment(rng: np.random.Generator, float_type: Any) -> None:
    basis, coef = operands(rng, 256, 40, 32)
    x = rng.standard_normal((9, 256)).astype(float_type)
    y, low = computed(x, basis, coef, 32, offset=4)
    wanted_y, wanted_low = reference.spectral_branch(x, basis, coef, np.array([32]))
    close(y, wanted_y)
    close(low, wanted_low)


@pytest.mark.parametrize("r", [32, 70])
def test_the_largest_values_and_what_is_not_finite(rng: np.random.Generator, r: int) -> None:
    """A token that is not finite makes no other so."""
    basis, coef = operands(rng, 128, 40, r)
    x = (rng.standard_normal((4, 128)) * np.array([[1e30], [1e-30], [1], [0]])).astype(np.float32)
    x[2, 5] = np.inf
    y, low = computed(x, basis, coef, r)
    wanted_y, wanted_low = reference.spectral_branch(x[[0, 1, 3]], basis, coef, np.array([r]))
    for row, token in enumerate((0, 1, 3)):
        close(y[token], wanted_y[row])
        close(low[token], wanted_low[row])
    assert not np.isfinite(low[2]).any()
    assert not np.isfinite(y[2]).any()


def test_no_tokens_and_no_columns(rng: np.random.Generator) -> None:
    basis, coef = operands(rng, 64, 40, 5)
    y, low = computed(np.zeros((0, 64), np.float32), basis, coef, 5)
    assert (y.shape, low.shape) == ((0, 40), (0, 5))
    y, low = computed(np.ones((3, 64), np.float32), basis[:, :0], coef[:0], 0)
    assert low.shape == (3, 0)
    assert (y == 0).all()


def test_what_is_refused(rng: np.random.Generator) -> None:
    basis, coef = operands(rng, 64, 40, 5)
    x, b, c, y, low = (DeviceArray(a) for a in (np.ones((3, 64), np.float32), basis, coef, np.ones((3, 40)), basis))
    with pytest.raises(SpecQuantError, match=r"y is float64 \[3, 40\]; it should be float32"):
        library_cuda_branch.branch_problem(x, b, c, y, low)
    with pytest.raises(SpecQuantError, match="x is float64"):
        library_cuda_branch.branch_problem(DeviceArray(np.ones((3, 64))), b, c, y, low)
    y, low = DeviceArray(np.ones((3, 40), np.float32)), DeviceArray(np.ones((3, 5), np.float32))
    for change, words in (({"rank": 6}, "rank must be"), ({"in_features": 0}, "in-features"), ({"half": 2}, "half")):
        problem = library_cuda_branch.branch_problem(x, b, c, y, low)
        for name, value in change.items():
            setattr(problem, name, value)
        with pytest.raises(SpecQuantError, match=words):
            library_cuda_branch.branch_workspace(problem)
    problem = library_cuda_branch.branch_problem(x, b, c, y, low)
    with pytest.raises(SpecQuantError, match="the workspace must have 512 bytes"):
        library_cuda_branch.branch(problem, DeviceArray(np.zeros(0, np.uint8)))
    problem.low = None
    with pytest.raises(SpecQuantError, match="low are missing"):
        library_cuda_branch.branch(problem, DeviceArray(np.zeros(512, np.uint8)))
