"""The CPU kernels, every instruction set that this machine has, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library, reference
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import pack_group_scales, pack_int4
from tests.ops import Arrays, random_input, random_weights

try:
    ISAS = [name for name, supported in library.isas().items() if supported]
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)

TOKENS = [0, 1, 2, 3, 17, 130]
GROUPS = [(0, 0), (8, 0), (0, 8), (8, 24), (32, 64), (64, 32), (64, 64), (128, 0)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def features(rng: np.random.Generator, group_size: int, act_group: int) -> int:
    """Some number of in-features that the groups divide; a ragged one where there are none."""
    largest = max(group_size, act_group)
    return int(largest * rng.integers(1, 4)) if largest else int(rng.integers(1, 90))


def matmul(x: NDArray[Any], weights: Arrays, isa: str, **attributes: Any) -> NDArray[Any]:
    operands: dict[str, Any] = dict(weights)
    if "rank" in operands:
        operands["rank"] = int(operands["rank"][0])
    return library.specquant_matmul(x, **operands, **attributes, isa=isa)[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_integers_are_exact(rng: np.random.Generator, isa: str, bits: int) -> None:
    """Whole numbers, scales that are powers of two: a sum that is off by one shows."""
    qmax = 254 if bits == 8 else 2**bits - 1
    for tokens in TOKENS:
        group_size, act_group = GROUPS[rng.integers(len(GROUPS))]
        n, m = max(features(rng, group_size, act_group), 2), int(rng.integers(1, 41))
        weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, group_size)
        weights["scales"] = (2.0 ** rng.integers(-3, 4, weights["scales"].shape)).astype(np.float16)
        weights["bias"] = rng.integers(-99, 99, m).astype(np.float32)
        low = -(qmax // 2)
        x = rng.integers(low, low + qmax + 1, (tokens, n)).astype(np.float32)
        x[:, :: act_group or n], x[:, 1 :: act_group or n] = low, low + qmax  # so that every scale is 1
        attributes = {"group_size": group_size, "act_bits": bits, "act_group": act_group}
        expected = reference.int4_residual_matmul(x, **weights, **attributes)
        np.testing.assert_array_equal(matmul(x, weights, isa, **attributes), expected, str((n, m, attributes)))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("subtract", [0, 1])
def test_matmul_equals_reference(rng: np.random.Generator, isa: str, bits: int, subtract: int) -> None:
    for tokens in TOKENS:
        group_size, act_group = GROUPS[rng.integers(len(GROUPS))]
        n, m = features(rng, group_size, act_group), int(rng.integers(1, 41))
        r = int(rng.integers(0, min(n, 40) + 1))
        weights = random_weights(rng, "SpecQuantMatMul", n, m, r, group_size)
        weights["rank"] = np.array([rng.integers(0, r + 1)])
        x = random_input(rng, (tokens, n))
        attributes = {"group_size": group_size, "act_bits": bits, "act_group": act_group, "subtract": subtract}
        attributes["hadamard"] = int(rng.choice([block for block in (0, 16, 64) if block == 0 or n % block == 0]))
        attributes["act_clip"] = float(rng.choice([1.0, 0.75, 0.5]))
        expected = reference.specquant_matmul(x, **weights, **attributes)
        size = max(float(np.abs(expected).max(initial=0)), 1.0)
        y = matmul(x, weights, isa, **attributes)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * size, err_msg=str((n, m, r, attributes)))


@pytest.mark.parametrize(("n", "bits"), [(8192, 8), (4104, 4), (16384, 2)])
def test_long_segments_of_the_largest_values(rng: np.random.Generator, isa: str, n: int, bits: int) -> None:
    """All weights −8 and activations at both ends: sums too large for int16."""
    qmax = 254 if bits == 8 else 2**bits - 1
    q = np.full((n, 19), -8, np.int8)
    q[rng.integers(n, size=5)] = 7
    x = np.full((3, n), qmax, np.float32)
    x[:, rng.integers(n, size=9)] = 0
    x[1] = -x[1]
    groups, scales = pack_group_scales(np.ones((1, 19), np.int8)), np.full(19, 0.5, np.float16)
    weights = {"qweight": pack_int4(q), "group_scales": groups, "scales": scales, "bias": np.zeros(19, np.float32)}
    exact = x.astype(np.int64) @ q.astype(np.int64)
    np.testing.assert_array_equal(matmul(x, weights, isa, act_bits=bits), (exact * 0.5).astype(np.float32))


def test_more_tokens_than_a_chunk(rng: np.random.Generator, isa: str) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 16, 5, 3, 8)
    attributes = {"group_size": 8, "act_bits": 4, "act_group": 16, "subtract": 1}
    x = random_input(rng, (1100, 16))
    whole = matmul(x, weights, isa, **attributes)
    parts = np.concatenate([matmul(x[i : i + 1], weights, isa, **attributes) for i in range(len(x))])
    np.testing.assert_allclose(whole, parts, rtol=0, atol=1e-5 * np.abs(whole).max())
    expected = reference.specquant_matmul(x, **weights, **attributes)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128, 512, 4096])
def test_rotated_inputs_are_bit_exact(rng: np.random.Generator, isa: str, block: int) -> None:
    """One column of the basis picks a feature of x H, so `low` shows it."""
    n = block * 3 if block < 512 else block
    picked = np.zeros((n, 9), np.float16)
    picked[rng.permutation(n)[:9], range(9)] = 1
    x = rng.standard_normal((5, n)).astype(np.float32)
    _, low = library.specquant_matmul(x, basis=picked, coef=np.ones((9, 4), np.float16), hadamard=block, isa=isa)
    expected = reference.block_hadamard(x, block)
    np.testing.assert_array_equal(low, expected @ picked.astype(np.float32))
    np.testing.assert_allclose(np.square(expected).sum(), np.square(x).sum(), rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_branch_alone(rng: np.random.Generator, isa: str, tokens: int) -> None:
    n, m, r = int(rng.integers(1, 80)), int(rng.integers(1, 41)), 0
    for r in (0, 1, min(n, 31), n):
        weights = random_weights(rng, "SpectralBranch", n, m, r)
        rank = int(rng.integers(0, r + 1))
        x = random_input(rng, (tokens, n))
        y, low = library.specquant_matmul(x, basis=weights["basis"], coef=weights["coef"], rank=rank, isa=isa)
        expected, expected_low = reference.spectral_branch(x, weights["basis"], weights["coef"], np.array([rank]))
        np.testing.assert_array_equal(low, expected_low)  # low is exact, see random_weights
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1))


def test_float16_in_and_out_is_rounded_once(rng: np.random.Generator, isa: str) -> None:
    """Products of two float16 are exact in float32: y = x · diag(c) must be NumPy's rounding, bit for bit."""
    finite = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    x = rng.permutation(finite)[: len(finite) // 8 * 8].reshape(-1, 8)
    factors = rng.choice(finite[np.abs(finite) < 8], 8)
    identity = np.eye(8, dtype=np.float16)
    y, low = library.specquant_matmul(x, basis=identity, coef=np.diag(factors), isa=isa)
    assert low is not None
    np.testing.assert_array_equal(low, x)
    with np.errstate(over="ignore"):
        expected = (x.astype(np.float32) * factors.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_float16_matmul(rng: np.random.Generator, isa: str, bits: int) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 72, 21, 9, 24)
    attributes = {"group_size": 24, "act_bits": bits, "act_group": 8, "subtract": 1}
    x = random_input(rng, (7, 72), np.float16)
    y = matmul(x, weights, isa, **attributes)
    assert y.dtype == np.float16
    expected = reference.specquant_matmul(x.astype(np.float32), **weights, **attributes)
    np.testing.assert_allclose(y, expected, rtol=2**-11 + 1e-5, atol=1e-5 * np.abs(expected).max())


EXTREMES = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "huge": lambda rng, shape: rng.standard_normal(shape) * 3e37,
    "overflowing": lambda rng, shape: rng.choice([-3e38, 3e38, 1.0], shape),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-30,
    "denormal": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
    "constant": lambda rng, shape: np.full(shape, rng.standard_normal()),
    "negative": lambda rng, shape: -rng.random(shape) - 1,
    "ties": lambda rng, shape: rng.integers(0, 31, shape) / 2,
    "nan": lambda rng, shape: np.where(rng.random(shape) < 0.02, np.nan, rng.standard_normal(shape)),
    "infinite": lambda rng, shape: np.where(rng.random(shape) < 0.02, np.inf, rng.standard_normal(shape)),
    "minus infinity": lambda rng, shape: np.where(rng.random(shape) < 0.02, -np.inf, rng.standard_normal(shape)),
}


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_quantised_activations_are_bit_exact(
    rng: np.random.Generator, isa: str, kind: str, bits: int, clip: float
) -> None:
    for n, group in ((int(rng.integers(1, 200)), 0), (192, 8), (192, 24), (192, 64)):
        u = EXTREMES[kind](rng, (6, n)).astype(np.float32)
        q, scale, zero_point = reference.quantize_activation(u, bits, group, clip)
        levels, our_scale = library.quantize_activation(u, bits, group, isa, clip)
        np.testing.assert_array_equal(our_scale, scale)
        np.testing.assert_array_equal(levels, q - zero_point.repeat(group or n, axis=-1))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_spoils_its_token_only(
    rng: np.random.Generator, isa: str, bits: int, value: float
) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 48, 21, 0, 0)
    x = rng.standard_normal((9, 48)).astype(np.float32)
    x[4, rng.integers(48)] = value
    y = matmul(x, weights, isa, act_bits=bits, act_group=16)
    assert not np.isfinite(y[4]).any()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()
    assert bits == 16 or np.isnan(y[4]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_bits": 9}, "act_bits"),
        ({"hadamard": 4}, "hadamard"),
        ({"hadamard": 32}, "hadamard"),
        ({"act_clip": 1.5}, "act_clip"),
        ({"act_clip": float("nan")}, "act_clip"),
        ({"act_bits": 1}, "act_bits"),
        ({"group_size": 12}, "group_size"),
        ({"group_size": -8}, "group_size"),
        ({"act_group": 40}, "act_group"),
        ({"group_size": 16, "act_group": 24}, "divide"),
        ({"rank": 8}, "rank"),
        ({"rank": -1}, "rank"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(
    rng: np.random.Generator, changes: dict[str, Any], message: str
) -> None:
    weights: dict[str, Any] = random_weights(rng, "SpecQuantMatMul", 48, 5, 7)
    weights |= {"rank": 7, "act_bits": 4} | changes
    with pytest.raises(SpecQuantError, match=message):
        library.specquant_matmul(random_input(rng, (2, 48)), **weights)


def test_an_unknown_instruction_set_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(SpecQuantError, match=r"mmx.*scalar"):
        library.quantize_activation(random_input(rng, (1, 8)), 4, 0, "mmx")
