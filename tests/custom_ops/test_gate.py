"""Gates at the end of the matmul ops: kernels of every instruction set here, and the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library, reference
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.schema import GATES
from tests.ops import Arrays, random_input, random_weights

try:
    ISAS = [name for name, supported in library.isas().items() if supported]
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)

KINDS = range(1, len(GATES))
SILU = GATES.index("silu")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def matmul(x: NDArray[Any], weights: Arrays, isa: str, **rest: Any) -> NDArray[Any]:
    operands: dict[str, Any] = dict(weights)
    if "rank" in operands:
        operands["rank"] = int(operands["rank"][0])
    return library.specquant_matmul(x, **operands, **rest, isa=isa)[0]


def exact(v: NDArray[np.floating[Any]], gate: int) -> NDArray[np.float64]:
    """In float64, whatever the size of a gate."""
    g, up = v[:, ::2].astype(np.float64), v[:, 1::2].astype(np.float64)
    w = g if gate == SILU else np.sqrt(8 / np.pi) * (g + 0.044715 * g**3)
    with np.errstate(over="ignore"):
        return np.asarray(g / (1 + np.exp(-w)) * up)


def close_to_exact(y: NDArray[np.float32], v: NDArray[np.float32], gate: int) -> None:
    """To a few units in the last place; the exponent of gelu is itself rounded."""
    expected, g = exact(v, gate), np.abs(v[:, ::2].astype(np.float64))
    with np.errstate(over="ignore"):
        rtol = 6e-7 if gate == SILU else 5e-7 * (1 + np.minimum(1.6 * g + 0.072 * g**3, 100))
    np.testing.assert_array_less(np.abs(y - expected), rtol * np.abs(expected) + 1e-34)


@pytest.mark.parametrize("gate", KINDS)
def test_gates_of_every_size(rng: np.random.Generator, isa: str, gate: int) -> None:
    """One feature of 1 per token, times a bias: the gates are whatever the bias says."""
    for m in (2, 6, 14, 16, 18, 30, 32, 66, 96):
        sizes = 10.0 ** rng.uniform(-44, 38.5, m)
        bias = (sizes * rng.choice([-1, 1], m)).astype(np.float32)
        special = np.array([0, -0.0, 3.4e38, -3.4e38, 1e-45, -1e-45], np.float32)[: m // 2]
        bias[: 2 * len(special) : 2], bias[1::2] = special, 1
        weights = random_weights(rng, "Int4ResidualMatMul", 8, m, 0) | {"bias": bias}
        x = np.zeros((int(rng.choice([1, 2, 13])), 8), np.float32)
        y = matmul(x, weights, isa, gate=gate)
        with np.errstate(over="ignore", invalid="ignore"):
            theirs = reference.int4_residual_matmul(x, **weights, gate=gate)
        for result in (y, theirs):
            assert result.shape == (len(x), m // 2)
            close_to_exact(result, np.tile(bias, (len(x), 1)), gate)


@pytest.mark.parametrize("gate", KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("op", ["Int4ResidualMatMul", "SpecQuantMatMul"])
def test_call_is_that_of_its_parts(rng: np.random.Generator, isa: str, gate: int, bits: int, op: str) -> None:
    """The call without a gate, then the gate: with Hadamard, branch and groups, of all tiles."""
    for tokens, n in ((1, 24), (1, 192), (3, 192), (13, 64), (40, 192), (2, 45)):
        m, groups = 2 * int(rng.integers(1, 90)), {"group_size": 8, "act_group": 8} if n % 8 == 0 else {}
        weights = random_weights(rng, op, n, m, 5, groups.get("group_size", 0))
        x = rng.standard_normal((tokens, n)).astype(np.float32)
        attributes = {"act_bits": bits, "hadamard": 8 if groups else 0, **groups}
        if op == "SpecQuantMatMul":
            attributes["subtract"] = 1
        y = matmul(x, weights, isa, **attributes, gate=gate)
        close_to_exact(y, matmul(x, weights, isa, **attributes), gate)
        half = matmul(x.astype(np.float16), weights, isa, **attributes, gate=gate)
        whole = matmul(x.astype(np.float16).astype(np.float32), weights, isa, **attributes, gate=gate)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(half, whole.astype(np.float16))


@pytest.mark.parametrize("gate", KINDS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_call_equals_reference(rng: np.random.Generator, isa: str, gate: int, float_type: type) -> None:
    for tokens, n, m in ((1, 45, 34), (17, 192, 70), (130, 64, 16)):
        weights = random_weights(rng, "SpecQuantMatMul", n, m, 5)
        x = random_input(rng, (tokens, n), float_type)
        expected = reference.specquant_matmul(x / 8, **weights, gate=gate, subtract=1)
        y = matmul(x / 8, weights, isa, gate=gate, subtract=1)
        assert y.dtype == expected.dtype == float_type
        size = max(float(np.abs(expected.astype(np.float32)).max()), 1.0)
        np.testing.assert_allclose(y, expected, rtol=0, atol=(2e-5 if float_type is np.float32 else 1.5e-3) * size)


@pytest.mark.parametrize("gate", KINDS)
def test_every_path_gives_the_same_bits(rng: np.random.Generator, isa: str, gate: int) -> None:
    """A token alone and among others; by vectors of 8 lanes or of 16."""
    n, m = 320, 206
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, 64)
    x = rng.standard_normal((1037, n)).astype(np.float32)
    rest = {"group_size": 64, "act_bits": 8, "act_group": 64, "gate": gate}
    whole = matmul(x, weights, isa, **rest)
    for row in (0, 7, 8, 500, 1023, 1024, 1036):
        np.testing.assert_array_equal(whole[row], matmul(x[row : row + 1], weights, isa, **rest)[0])
    for other in ISAS:
        if "scalar" not in (isa, other):
            np.testing.assert_array_equal(whole[:41], matmul(x[:41], weights, other, **rest))


@pytest.mark.parametrize("gate", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_spoils_its_token_only(
    rng: np.random.Generator, isa: str, gate: int, value: float
) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 45, 22, 0)
    for float_type in (np.float32, np.float16):
        x = rng.standard_normal((9, 45)).astype(float_type)
        x[4, rng.integers(45)] = value
        y = matmul(x, weights, isa, act_bits=4, gate=gate)
        assert np.isnan(y[4]).all()
        assert np.isfinite(np.delete(y, 4, axis=0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": 3}, "gate must be 0 to 2"),
        ({"gate": -1}, "gate must be 0 to 2"),
        ({"gate": 1, "residual": np.zeros((2, 6), np.float32)}, "no residual"),
        ({"gate": 1, "within": 1.0}, "within"),
    ],
)
def test_what_does_not_fit_is_refused(rng: np.random.Generator, changes: dict[str, Any], message: str) -> None:
    weights: dict[str, Any] = random_weights(rng, "Int4ResidualMatMul", 48, 6, 0)
    with pytest.raises(SpecQuantError, match=message):
        library.specquant_matmul(**{"x": random_input(rng, (2, 48)), **weights, **changes})
    odd: dict[str, Any] = random_weights(rng, "Int4ResidualMatMul", 48, 5, 0)
    with pytest.raises(SpecQuantError, match="even"):
        library.specquant_matmul(random_input(rng, (2, 48)), **odd, gate=1)
