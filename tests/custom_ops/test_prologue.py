"""Norms and residuals inside the matmul ops: kernels of every instruction set here, and the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library, reference
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.schema import PROLOGUES
from tests.ops import Arrays, random_input, random_weights

try:
    ISAS = [name for name, supported in library.isas().items() if supported]
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)

KINDS = range(len(PROLOGUES))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def given(rng: np.random.Generator, prologue: int, n: int) -> dict[str, Any]:
    """What a call with that prologue takes besides x."""
    if PROLOGUES[prologue] != "rms_norm":
        return {"prologue": prologue}
    norm = rng.uniform(-2, 2, n).astype(np.float32)
    return {"prologue": prologue, "norm": norm, "epsilon": float(rng.choice([0.0, 1e-6, 1e-5, 0.5]))}


def by_kernel(x: NDArray[Any], isa: str, n: int, **rest: Any) -> NDArray[np.float32]:
    """x̂ float32 [T, n] of finite x, made float32: the columns of an identity pick it as `low`."""
    eye = np.eye(n, dtype=np.float16)
    low = library.specquant_matmul(x.astype(np.float32), basis=eye, coef=np.ones((n, 1), np.float16), isa=isa, **rest)[
        1
    ]
    assert low is not None
    return low


def matmul(x: NDArray[Any], weights: Arrays, isa: str, **rest: Any) -> NDArray[Any]:
    operands: dict[str, Any] = dict(weights)
    if "rank" in operands:
        operands["rank"] = int(operands["rank"][0])
    return library.specquant_matmul(x, **operands, **rest, isa=isa)[0]


def exact(x: NDArray[np.float32], prologue: int, **rest: Any) -> NDArray[np.float64]:
    """x̂ in float64."""
    wide = x.astype(np.float64)
    if PROLOGUES[prologue] == "rms_norm":
        root = np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float64(np.float32(rest["epsilon"])))
        return np.asarray(wide / root * rest["norm"])
    return wide


@pytest.mark.parametrize("prologue", KINDS)
def test_prologue_is_accurate(rng: np.random.Generator, isa: str, prologue: int) -> None:
    """To a few units in the last place."""
    for n in (1, 7, 8, 9, 30, 64, 101):
        scale = float(rng.choice([1e-4, 1.0, 20.0]))
        x = (rng.standard_normal((5, n)) * scale).astype(np.float32)
        x[rng.random(x.shape) < 0.1] = 0
        rest = given(rng, prologue, n)
        if rest.get("epsilon") == 0:
            x[:, 0] = 1  # a row of zeros has no norm
        ours, expected = by_kernel(x, isa, n, **rest), exact(x, **rest)
        np.testing.assert_array_less(np.abs(ours - expected), 6e-7 * np.abs(expected) + 1e-34, str((n, rest)))


@pytest.mark.parametrize("prologue", KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("op", ["Int4ResidualMatMul", "SpecQuantMatMul"])
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_call_is_that_of_its_parts_bit_for_bit(
    rng: np.random.Generator, isa: str, prologue: int, bits: int, op: str, float_type: type
) -> None:
    """Prologue, plain call in float32, sum with the residual, one rounding: with Hadamard, branch and groups."""
    for tokens, n in ((1, 24), (3, 192), (13, 64), (40, 192), (2, 45)):
        m, groups = int(rng.integers(1, 90)), {"group_size": 8, "act_group": 8} if n % 8 == 0 else {}
        weights = random_weights(rng, op, n, m, 5, groups.get("group_size", 0))
        x = rng.standard_normal((tokens, n)).astype(float_type)
        residual = (100 * rng.standard_normal((tokens, m))).astype(float_type)
        rest, attributes = given(rng, prologue, n), {"act_bits": bits, "hadamard": 8 if groups else 0, **groups}
        if op == "SpecQuantMatMul":
            attributes["subtract"] = 1
        y = matmul(x, weights, isa, **attributes, **rest, residual=residual)
        plain = matmul(by_kernel(x, isa, n, **rest), weights, isa, **attributes)
        np.testing.assert_array_equal(y, (plain + residual.astype(np.float32)).astype(float_type))
        without = matmul(x, weights, isa, **attributes, **rest)
        np.testing.assert_array_equal(without, plain.astype(float_type))


@pytest.mark.parametrize("prologue", KINDS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_call_equals_reference(rng: np.random.Generator, isa: str, prologue: int, float_type: type) -> None:
    for tokens, n, m in ((1, 45, 33), (17, 192, 70), (130, 64, 16)):
        weights = random_weights(rng, "SpecQuantMatMul", n, m, 5)
        x = random_input(rng, (tokens, n), float_type)
        x[:, 0] = 1
        residual = rng.standard_normal((tokens, m)).astype(float_type)
        rest = given(rng, prologue, n) | {"residual": residual, "subtract": 1}
        expected = reference.specquant_matmul(x, **weights, **rest)
        y = matmul(x, weights, isa, **rest)
        assert y.dtype == expected.dtype == float_type
        size = max(float(np.abs(expected.astype(np.float32)).max()), 1.0)
        np.testing.assert_allclose(y, expected, rtol=0, atol=(2e-5 if float_type is np.float32 else 1.5e-3) * size)


@pytest.mark.parametrize("prologue", KINDS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_a_token_alone_gives_the_same_bits(rng: np.random.Generator, isa: str, prologue: int, float_type: type) -> None:
    n, m = 320, 203
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, 64)
    x = rng.standard_normal((1037, n)).astype(float_type)
    residual = rng.standard_normal((len(x), m)).astype(float_type)
    rest = {"group_size": 64, "act_bits": 8, "act_group": 64, **given(rng, prologue, n)}
    whole = matmul(x, weights, isa, **rest, residual=residual)
    for row in (0, 7, 8, 500, 1023, 1024, 1036):
        alone = matmul(x[row : row + 1], weights, isa, **rest, residual=residual[row : row + 1])
        np.testing.assert_array_equal(whole[row], alone[0])


@pytest.mark.parametrize("prologue", KINDS)
@pytest.mark.parametrize(("n", "group", "hadamard"), [(320, 64, 0), (320, 64, 64), (512, 64, 256), (328, 8, 8)])
def test_vector_paths_agree_bit_for_bit(
    rng: np.random.Generator, prologue: int, n: int, group: int, hadamard: int
) -> None:
    """Whether rows go through vectors of 8 lanes or of 16."""
    paths = [name for name in ISAS if name != "scalar"]
    if len(paths) < 2:
        pytest.skip("this CPU has fewer than two vector paths")
    m = 203
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, group)
    x = rng.standard_normal((41, n)).astype(np.float32)
    rest = {"group_size": group, "act_bits": 8, "act_group": group, "hadamard": hadamard, **given(rng, prologue, n)}
    rest["residual"] = rng.standard_normal((41, m)).astype(np.float32)
    first, *others = (matmul(x, weights, path, **rest) for path in paths)
    for y in others:
        np.testing.assert_array_equal(y, first)


@pytest.mark.parametrize("prologue", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_value_that_is_not_finite_spoils_its_token_only(
    rng: np.random.Generator, isa: str, prologue: int, value: float, bits: int
) -> None:
    for float_type in (np.float32, np.float16):
        n = 45
        weights = random_weights(rng, "Int4ResidualMatMul", n, 21, 0)
        x = (np.abs(rng.standard_normal((9, n))) + 0.1).astype(float_type)
        x[4, rng.integers(x.shape[1])] = value
        rest = given(rng, prologue, n) | {"residual": rng.standard_normal((9, 21)).astype(float_type)}
        y = matmul(x, weights, isa, act_bits=bits, **rest)
        assert not np.isfinite(y[4]).any()
        assert np.isfinite(np.delete(y, 4, axis=0)).all()
        assert bits == 16 or np.isnan(y[4]).all()
        rest["residual"][2, 3] = value
        spoilt = np.isfinite(matmul(x, weights, isa, act_bits=bits, **rest))
        assert (~spoilt).sum() == 22
        assert not spoilt[2, 3]


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-30, 1e-42])
def test_squares_that_float32_cannot_hold(rng: np.random.Generator, isa: str, value: float) -> None:
    """As in NumPy's float32: too large, and x̂ is 0; too small, and only epsilon is left of the root."""
    x = np.full((2, 24), value, np.float32)
    norm = rng.uniform(1, 2, 24).astype(np.float32)
    ours = by_kernel(x, isa, 24, prologue=1, norm=norm, epsilon=1e-5)
    expected = reference.prologue_of(x, 1, norm, 1e-5)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-44)
    assert (ours == 0).all() == (abs(value) > 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prologue": 2}, "prologue"),
        ({"prologue": -1}, "prologue"),
        ({"prologue": 1}, "norm"),
        ({"prologue": 1, "norm": np.ones(47, np.float32)}, "norm"),
        ({"prologue": 1, "norm": np.ones(48, np.float32), "epsilon": -1.0}, "epsilon"),
        ({"prologue": 1, "norm": np.ones(48, np.float32), "epsilon": float("nan")}, "epsilon"),
        ({"residual": np.zeros((2, 4), np.float32)}, "residual"),
        ({"residual": np.zeros((2, 5), np.float16)}, "residual"),
    ],
)
def test_what_does_not_fit_is_refused(rng: np.random.Generator, changes: dict[str, Any], message: str) -> None:
    weights: dict[str, Any] = random_weights(rng, "Int4ResidualMatMul", 48, 5, 0)
    with pytest.raises(SpecQuantError, match=message):
        library.specquant_matmul(**{"x": random_input(rng, (2, 48)), **weights, **changes})
