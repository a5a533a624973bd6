"""Sizes that reach every tile of the INT4 multiply, and its ways of reading short and long panels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library, reference
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import pack_group_scales, pack_int4
from tests.ops import random_input, random_weights

try:
    ISAS = [name for name, supported in library.isas().items() if supported]
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 7, 8, 16])
@pytest.mark.parametrize("n", [192, 2112])
def test_every_tile(rng: np.random.Generator, isa: str, bits: int, n: int) -> None:
    """1 to 17 tokens, 1 to 11 panels with a ragged end; 2,112 features are a panel of over 16 KB."""
    for tokens in (1, 2, 3, 7, 8, 15, 17):
        m = int(rng.integers(1, 180))
        group_size, act_group = ((64, 64), (192, 64), (64, 192), (8, 8))[rng.integers(4)]
        weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, group_size)
        x = random_input(rng, (tokens, n))
        attributes = {"group_size": group_size, "act_bits": bits, "act_group": act_group}
        y, _ = library.specquant_matmul(x, **weights, **attributes, isa=isa)
        expected = reference.int4_residual_matmul(x, **weights, **attributes)
        limit = 1e-5 * float(np.abs(expected).max())
        np.testing.assert_allclose(y, expected, rtol=0, atol=limit, err_msg=str((tokens, m, attributes)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "groups", [(0, 0), (704, 704), (352, 704), (0, 264), (1056, 0), (32, 64), (96, 48), (88, 88), (192, 0)]
)
def test_many_tokens(rng: np.random.Generator, isa: str, bits: int, groups: tuple[int, int]) -> None:
    """AMX tiles of 64, 48 and 32 features, or none; 2,112 are more than are unpacked at a time."""
    group_size, act_group = groups
    for tokens in (8, 16, 31, 32, 41, 300):
        m = int(rng.integers(1, 180))
        weights = random_weights(rng, "Int4ResidualMatMul", 2112, m, 0, group_size)
        x = random_input(rng, (tokens, 2112))
        attributes = {"group_size": group_size, "act_bits": bits, "act_group": act_group}
        y, _ = library.specquant_matmul(x, **weights, **attributes, isa=isa)
        expected = reference.int4_residual_matmul(x, **weights, **attributes)
        limit = 1e-5 * float(np.abs(expected).max())
        np.testing.assert_allclose(y, expected, rtol=0, atol=limit, err_msg=str((tokens, m)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("groups", [(8, 8), (8, 24), (24, 8), (64, 64), (64, 0), (64, 32), (32, 96)])
def test_every_scale_of_a_group_in_every_lane(
    rng: np.random.Generator, isa: str, bits: int, groups: tuple[int, int]
) -> None:
    """Whole numbers below 2^24, so that nothing is rounded in any order."""
    group_size, act_group = groups
    n, m = 3 * max(groups), 16 * 16 + 5
    group, output = np.indices((n // group_size, m))
    c = ((group + output + output // 16) % 16 + 1).astype(np.int8)
    q = rng.integers(-8, 8, (n, m), dtype=np.int8)
    scales = (2.0 ** rng.integers(-3, 4, m)).astype(np.float16)
    weights = {"qweight": pack_int4(q), "group_scales": pack_group_scales(c), "scales": scales}
    for tokens in (1, 2, 5, 8, 40):
        x = rng.integers(-127, 128, (tokens, n))
        x[:, :: act_group or n] = 127  # an activation scale of 1
        attributes = {"group_size": group_size, "act_bits": bits, "act_group": act_group}
        y, _ = library.specquant_matmul(x.astype(np.float32), **weights, **attributes, isa=isa)
        exact = x.astype(np.int64) @ (q * c.repeat(group_size, axis=0).astype(np.int64))
        np.testing.assert_array_equal(y, exact * scales.astype(np.float64), str(tokens))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 13, 70])
def test_vector_paths_agree_bit_for_bit(rng: np.random.Generator, bits: int, tokens: int) -> None:
    """They fuse the same multiply-adds in the same order, whatever their tiles; without a branch nothing else adds."""
    paths = [name for name in ISAS if name != "scalar"]
    if len(paths) < 2:
        pytest.skip("this CPU has fewer than two vector paths")
    weights = random_weights(rng, "Int4ResidualMatMul", 320, 203, 0, 64)
    x = rng.standard_normal((tokens, 320)).astype(np.float32)
    first, *others = (
        library.specquant_matmul(x, **weights, group_size=64, act_bits=bits, act_group=64, isa=isa)[0] for isa in paths
    )
    assert np.abs(first).max() > 1
    for y in others:
        np.testing.assert_array_equal(y, first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [65536, 65600])
def test_the_largest_sums_of_one_token(rng: np.random.Generator, isa: str, n: int) -> None:
    """One segment, every level at its end and most nibbles 15: on either side of what 16 times the high ones may be."""
    weights = random_weights(rng, "Int4ResidualMatMul", n, 20, 0, 0)
    q = np.where(rng.random((n, 20)) < 0.99, np.int8(7), np.int8(-8))
    weights["qweight"] = pack_int4(q)
    for sign in (-1, 1):
        x = np.full((1, n), sign, np.float32)
        attributes = {"group_size": 0, "act_bits": 8, "act_group": 0}
        y, _ = library.specquant_matmul(x, **weights, **attributes, isa=isa)
        expected = reference.int4_residual_matmul(x, **weights, **attributes)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
def test_many_tokens_in_several_tasks(rng: np.random.Generator, isa: str) -> None:
    """A token's y does not depend on how many others there are: the grid of tasks leaves nothing out."""
    weights = random_weights(rng, "Int4ResidualMatMul", 640, 330, 0, 64)
    x = rng.standard_normal((1300, 640)).astype(np.float32)
    attributes = {"group_size": 64, "act_bits": 4, "act_group": 64}
    whole, _ = library.specquant_matmul(x, **weights, **attributes, isa=isa)
    for row in (0, 7, 8, 645, 655, 656, 1023, 1299):
        alone, _ = library.specquant_matmul(x[row : row + 1], **weights, **attributes, isa=isa)
        np.testing.assert_array_equal(whole[row], alone[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rank", [1, 8, 16, 24, 31, 32, 40, 64, 70])
@pytest.mark.parametrize("n", [205, 320])
def test_the_branch_of_many_tokens_and_of_one(rng: np.random.Generator, isa: str, n: int, rank: int) -> None:
    """From 16 tokens on the basis is turned first, unless it has more than 64 columns: y is the same, to the bit."""
    group = 64 if n == 320 else 0
    weights = random_weights(rng, "SpecQuantMatMul", n, 83, rank, group)
    x = random_input(rng, (21, n))
    attributes = {"group_size": group, "act_group": group, "subtract": 1}

    def y(x: NDArray[np.float32], act_bits: int) -> NDArray[np.float32]:
        operands = weights | {"rank": rank}
        result, _ = library.specquant_matmul(x, **operands, **attributes, act_bits=act_bits, isa=isa)
        return result

    expected = reference.specquant_matmul(x, **weights, **attributes, act_bits=16)
    np.testing.assert_allclose(y(x, 16), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    for act_bits in (4, 16):
        whole = y(x, act_bits)
        for row in (0, 7, 8, 15, 16, 20):
            np.testing.assert_array_equal(whole[row], y(x[row : row + 1], act_bits)[0])
