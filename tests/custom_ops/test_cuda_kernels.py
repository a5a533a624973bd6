"""The CUDA kernels, every path forced, against the reference: on a GPU, or compiled for the CPU (docs/cuda.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda, reference
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import pack_group_scales, pack_int4, unpack_int4
from specquant.custom_ops.schema import PROLOGUES
from tests.cuda_arrays import POISON, DeviceArray, capability, require_kernels
from tests.cuda_matmul import Call, paths
from tests.ops import random_input, random_weights

require_kernels()
HOPPER = capability() == (9, 0)
APART = {"x": 4}  # off its alignment: x that only the kernels of several passes take

# (group_size, act_group, features): segments of 64, 128 and of all features, and some that only `any` takes.
TENSOR_GROUPS = [(64, 64, 256), (64, 64, 64), (64, 0, 192), (0, 64, 320), (128, 128, 384), (0, 0, 320), (0, 0, 72)]
TENSOR_GROUPS += [(0, 0, 1152), (64, 0, 896), (128, 0, 256), (64, 128, 1024)]  # wgmma, once and more round its ring
TENSOR_GROUPS += [(256, 256, 768)]
OTHER_GROUPS = [(0, 0, 37), (8, 0, 40), (0, 8, 64), (8, 24, 72), (32, 64, 128), (64, 32, 192), (16, 16, 48)]
TOKENS = [1, 3, 8, 9, 17, 33, 130]


def case(rng: np.random.Generator, index: int) -> tuple[int, tuple[int, int, int]]:
    """Tokens and groups: every one of the groups in turn."""
    groups = [*TENSOR_GROUPS, *OTHER_GROUPS]
    return int(rng.choice(TOKENS)), groups[index % len(groups)]


COUNT = len(TENSOR_GROUPS) + len(OTHER_GROUPS)


@pytest.mark.parametrize("index", range(COUNT))
def test_integers_are_exact(rng: np.random.Generator, index: int) -> None:
    """Whole numbers, scales that are powers of two: a sum that is off by one shows."""
    tokens, groups = case(rng, index)
    group_size, act_group, n = groups
    bits, m = int(rng.choice([2, 3, 4, 7, 8])), int(rng.choice([8, 24, 144, 272, 528, 7]))
    qmax = 254 if bits == 8 else 2**bits - 1
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, group_size)
    weights["scales"] = (2.0 ** rng.integers(-3, 4, weights["scales"].shape)).astype(np.float16)
    weights["bias"] = rng.integers(-99, 99, m).astype(np.float32)
    low = -(qmax // 2)
    x = rng.integers(low, low + qmax + 1, (tokens, n)).astype(np.float32)
    x[:, :: act_group or n], x[:, 1 :: act_group or n] = low, low + qmax  # so that every scale is 1
    attributes: dict[str, Any] = {"group_size": group_size, "act_bits": bits, "act_group": act_group}
    expected = reference.int4_residual_matmul(x, **weights, **attributes)
    for path in paths(tokens, groups, bits, m):
        y = Call(x, weights, path, **attributes).y
        np.testing.assert_array_equal(y, expected, f"{path} T={tokens} M={m} {groups} bits={bits}")


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("index", range(COUNT))
def test_matmul_equals_reference(rng: np.random.Generator, index: int, bits: int) -> None:
    tokens, groups = case(rng, index)
    group_size, act_group, n = groups
    m, kind = int(rng.choice([8, 40, 144, 272, 19])), rng.choice([np.float32, np.float16])
    r = int(min(n, rng.choice([0, 1, 24, 31, 32, 33, 63, 64, 70])))
    weights = random_weights(rng, "SpecQuantMatMul", n, m, r, group_size)
    weights["rank"] = np.array([rng.integers(0, r + 1) if rng.random() < 0.5 else r])
    x = random_input(rng, (tokens, n), kind)
    attributes: dict[str, Any] = {"group_size": group_size, "act_bits": bits, "act_group": act_group}
    attributes |= {"subtract": int(rng.integers(2)), "act_clip": float(rng.choice([1.0, 0.75]))}
    # In blocks of 64 the transform of multiples of 1/8 is exact: 1/√64 is a power of two.
    attributes["hadamard"] = 64 if n % 64 == 0 and rng.random() < 0.3 else 0
    expected = reference.specquant_matmul(x.astype(np.float32), **weights, **attributes)
    size = max(float(np.abs(expected).max()), 1.0)
    tolerance = 1e-5 if kind == np.float32 and bits != 16 else 1e-3
    for path in paths(tokens, groups, bits, m, int(weights["rank"][0]), r):
        y = Call(x, weights, path, **attributes).y
        assert y.dtype == kind
        text = f"{path} T={tokens} M={m} r={r} {weights['rank']} {groups} {attributes}"
        np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=tolerance * size, err_msg=text)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [(64, 64), (64, 128), (128, 128), (64, 0), (0, 0)])
@pytest.mark.parametrize(("n", "m"), [(128, 1048), (448, 544), (576, 40), (1152, 8), (4160, 272), (8704, 328)])
def test_one_token(rng: np.random.Generator, n: int, m: int, groups: tuple[int, int], bits: int) -> None:
    """Odd numbers of groups, units that are not whole, more tiles than blocks, warps that take several units."""
    group_size, act_group = (group if n % max(group, 1) == 0 else 64 for group in groups)
    r = int(rng.choice([0, 5, 32, 64, 90]))
    weights = random_weights(rng, "SpecQuantMatMul", n, m, r, group_size)
    x = random_input(rng, (1, n), rng.choice([np.float32, np.float16]))
    residual = rng.standard_normal((1, m)).astype(x.dtype)
    attributes: dict[str, Any] = {"group_size": group_size, "act_group": act_group, "act_bits": bits, "subtract": 1}
    expected = reference.specquant_matmul(x.astype(np.float32), **weights, **attributes) + residual
    tolerance = (1e-5 if x.dtype == np.float32 else 1e-3) * float(np.abs(expected).max())
    for path in ["matvec", *(["cluster"] if HOPPER and r <= 64 else [])]:
        y = Call(x, weights | {"residual": residual}, path, **attributes).y
        text = f"{path} {n} x {m} r={r}"
        np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=tolerance, err_msg=text)


@pytest.mark.parametrize("prologue", range(len(PROLOGUES)))
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("index", range(0, COUNT, 3))
def test_prologue_and_residual(rng: np.random.Generator, index: int, kind: Any, prologue: int) -> None:
    """x̂ as the reference has it; then the plain call on it, and the sum: by every path."""
    tokens, (_, groups) = int(rng.choice([1, 9, 20])), case(rng, index)
    group_size, act_group, n = groups
    m, bits, rotated = int(rng.choice([8, 144, 19])), int(rng.choice([4, 8, 16])), 8 if n % 64 == 0 and index % 2 else 0
    weights = random_weights(rng, "SpecQuantMatMul", n, m, min(n, 9), group_size)
    x = random_input(rng, (tokens, n), kind)  # the sum of its squares is exact, too
    residual = (9 * rng.standard_normal((tokens, m))).astype(kind)
    norm = rng.uniform(-2, 2, n).astype(np.float32)
    plain: dict[str, Any] = {"group_size": group_size, "act_bits": bits, "act_group": act_group, "subtract": 1}
    arrays = weights | {"residual": residual} | ({"norm": norm} if prologue == 1 else {})
    attributes = {**plain, "prologue": prologue, "epsilon": 0.01}
    hat = x.astype(np.float32)
    if prologue:
        hat = Call(x, arrays, "any", APART, **attributes).read("rotated", np.float32, (tokens, n))
    expected = reference.prologue_of(x, prologue, norm, 0.01)
    np.testing.assert_allclose(hat, expected, rtol=3e-6, atol=1e-6 * np.abs(expected).max())
    offsets = APART if prologue and rng.integers(2) else {}
    if offsets:  # without low, which each kernel sums up in its own order
        plain["subtract"] = attributes["subtract"] = 0
        for name in ("basis", "coef", "rank"):
            del weights[name], arrays[name]
    for path in paths(tokens, groups, bits, m, min(n, 9))[1:]:
        y = Call(x, arrays, path, offsets, **attributes, hadamard=rotated).y
        wanted = Call(hat, weights, path, **plain, hadamard=rotated).y + residual.astype(np.float32)
        text = f"{path} T={tokens} M={m} {groups} bits={bits} hadamard={rotated}"
        if kind == np.float32:
            np.testing.assert_array_equal(y, wanted, text)
        else:  # the branch's trailing bits do not count
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max(), err_msg=text)


def rounding(v: NDArray[np.float32], gate: int) -> NDArray[np.float32]:
    """What gated outputs may be apart from the reference, relatively: the exponent is rounded, and may be large."""
    g = np.abs(v[:, ::2])
    with np.errstate(over="ignore"):
        exponent = np.minimum(g if gate == 1 else 1.6 * g + 0.072 * g**3, 150)
    return np.float32(1e-6) * (3 + exponent)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("index", range(COUNT))
def test_gate(rng: np.random.Generator, index: int, kind: Any, gate: int) -> None:
    """By every path what the reference makes of that path's own outputs in float32, of any size."""
    tokens, groups = case(rng, index)
    group_size, act_group, n = groups
    m, bits, r = int(rng.choice([8, 40, 272, 528, 22])), int(rng.choice([4, 8, 16])), int(rng.choice([0, 9, 32, 40]))
    r = min(n, r)
    weights = random_weights(rng, "SpecQuantMatMul", n, m, r, group_size)
    weights["scales"] = (weights["scales"] * np.float32(4.0 / n**0.5)).astype(np.float16)
    weights["coef"] = (weights["coef"] / np.float32(max(n, 1) ** 0.5)).astype(np.float16)
    weights["bias"] *= np.float32(20)
    x = random_input(rng, (tokens, n), kind)
    attributes: dict[str, Any] = {"group_size": group_size, "act_bits": bits, "act_group": act_group, "subtract": 1}
    if rng.integers(2):
        attributes |= {"prologue": 1, "epsilon": 0.01}
        weights["norm"] = rng.uniform(-2, 2, n).astype(np.float32)
    for path in paths(tokens, groups, bits, m, r, r):
        y = Call(x, weights, path, **attributes, gate=gate).y
        assert (y.dtype, y.shape) == (kind, (tokens, m // 2))
        text = f"{path} T={tokens} M={m} r={r} {groups} {attributes}"
        v = Call(x.astype(np.float32), weights, path, **attributes).y
        expected = reference.gated(v, gate)
        if kind == np.float32:
            np.testing.assert_array_less(np.abs(y - expected), rounding(v, gate) * np.abs(expected) + 1e-30, text)
        else:
            tolerance = 1e-3 * np.abs(expected).max() + 2.0**-24  # the least that float16 tells from 0
            np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance, err_msg=text)


@pytest.mark.parametrize("gate", [1, 2])
def test_gates_of_every_size(rng: np.random.Generator, gate: int) -> None:
    """Without overflow; a token that is not finite becomes NaN alone. By every path."""
    n, m = 128, 272
    groups = [(0, 0, n), (64, 64, n), (8, 8, n)][int(rng.integers(3))]
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, groups[0])
    weights["bias"] = (rng.standard_normal(m) * 10.0 ** rng.integers(-9, 6, m)).astype(np.float32)
    x = random_input(rng, (12, n))
    x[3], x[5, 7], x[8, 0] = 0, np.nan, -np.inf
    attributes: dict[str, Any] = {"group_size": groups[0], "act_group": groups[1], "act_bits": int(rng.choice([4, 8]))}
    good = [i for i in range(len(x)) if i not in (5, 8)]
    for path in paths(len(x), groups, attributes["act_bits"], m):
        y, v = (Call(x, weights, path, **attributes, **rest).y for rest in ({"gate": gate}, {}))
        assert np.isnan(y[[5, 8]]).all(), path
        expected = reference.gated(v, gate)[good]
        np.testing.assert_allclose(y[good], expected, rtol=1e-4, atol=1e-30, err_msg=f"{path} {groups} {attributes}")


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_residual_in_place(rng: np.random.Generator, kind: Any) -> None:
    """y where the residual was, by every path."""
    tokens, n, m = int(rng.choice([7, 150])), 128, 272
    weights = random_weights(rng, "SpecQuantMatMul", n, m, 9)
    x, residual = random_input(rng, (tokens, n), kind), rng.standard_normal((tokens, m)).astype(kind)
    operands = {k: DeviceArray(v) for k, v in weights.items() if k != "rank"}
    attributes: dict[str, Any] = {"act_bits": 4, "subtract": 1}
    for path in paths(tokens, (0, 0, n), 4, m, 9, 9):
        wanted = Call(x, weights | {"residual": residual}, path, **attributes).y
        y, on_gpu = DeviceArray(residual), DeviceArray(x)
        size = library_cuda.layout(on_gpu, **operands, **attributes, residual=y).bytes
        space = DeviceArray(np.full(size, POISON, np.uint8))
        library_cuda.matmul(on_gpu, y, space, path=path, **operands, **attributes, residual=y)
        np.testing.assert_array_equal(y.numpy(), wanted, str(path))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("groups", [(64, 64, 128), (0, 0, 128), (8, 16, 48)])
def test_extreme_values(rng: np.random.Generator, bits: int, groups: tuple[int, int, int]) -> None:
    """Zeros, huge and tiny numbers: as the reference. NaN and infinities: NaN, in their own token only."""
    group_size, act_group, n = groups
    weights = random_weights(rng, "SpecQuantMatMul", n, 24, 8, group_size)
    attributes: dict[str, Any] = {"group_size": group_size, "act_bits": bits, "act_group": act_group, "subtract": 1}
    x = random_input(rng, (12, n))
    x[1], x[2], x[3] = 0, x[2] * np.float32(2.0**100), x[3] * np.float32(2.0**-60)
    x[5, 3], x[7, 9], x[8, 0] = np.nan, np.inf, -np.inf
    bad = [5, 7, 8]
    good = [i for i in range(len(x)) if i not in bad]
    with np.errstate(all="ignore"):
        expected = reference.specquant_matmul(x, **weights, **attributes)
    size = np.abs(expected[good]).max(axis=1, keepdims=True) + 1e-30
    for path in paths(len(x), groups, bits, 24):
        y = Call(x, weights, path, **attributes).y
        assert not np.isfinite(y[bad]).any(), path
        if bits < 16:
            assert np.isnan(y[bad]).all(), path
        np.testing.assert_allclose(y[good] / size, expected[good] / size, rtol=0, atol=1e-3, err_msg=str(path))


@pytest.mark.parametrize(("n", "bits"), [(8192, 8), (4104, 4), (16384, 2)])
def test_long_segments_of_the_largest_values(rng: np.random.Generator, n: int, bits: int) -> None:
    """All weights −8 and activations at both ends: sums too large for int16."""
    qmax, m = 254 if bits == 8 else 2**bits - 1, 48
    q = np.full((n, m), -8, np.int8)
    q[rng.integers(n, size=5)] = 7
    x = np.full((3, n), qmax, np.float32)
    x[:, rng.integers(n, size=9)] = 0
    x[1] = -x[1]
    for c in (1, 16) if n % 64 == 0 else (1,):
        weights = {
            "qweight": pack_int4(q),
            "group_scales": pack_group_scales(np.full((1 if c == 1 else n // 64, m), c, np.int8)),
            "scales": np.full(m, 0.5, np.float16),
            "bias": np.zeros(m, np.float32),
        }
        group_size = 0 if c == 1 else 64
        expected = (x.astype(np.int64) @ q.astype(np.int64) * c * 0.5).astype(np.float32)
        for path in [p for p in paths(3, (group_size, 0, n), bits, m) if p]:
            y = Call(x, weights, path, act_bits=bits, group_size=group_size).y
            np.testing.assert_allclose(y, expected, rtol=2e-7, err_msg=path)


@pytest.mark.skipif(not HOPPER, reason="wgmma is Hopper's")
def test_bands_of_tokens(rng: np.random.Generator) -> None:
    """So many activations that tiles go through them in two bands, with a tile of fewer outputs at the end."""
    tokens, n, m = 1160, 12288, 528
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, 0)
    weights["scales"] = np.full(m, 0.5, np.float16)
    x = rng.integers(-7, 9, (tokens, n)).astype(np.float16)
    x[:, 0], x[:, 1] = -7, 8  # so that every scale is 1
    y = Call(x, weights, "wgmma_large", act_bits=4).y
    expected = x.astype(np.float32) @ unpack_int4(weights["qweight"], n, m).astype(np.float32) * 0.5 + weights["bias"]
    np.testing.assert_array_equal(y, expected.astype(np.float16))


def test_no_tokens(rng: np.random.Generator) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 64, 8, 5, 64)
    y = Call(np.empty((0, 64), np.float32), weights, group_size=64, act_bits=4, act_group=64).y
    assert y.shape == (0, 8)


def test_arrays_off_their_alignment(rng: np.random.Generator) -> None:
    """Addresses that vector loads cannot take: the library must see it and go another way."""
    weights = random_weights(rng, "SpecQuantMatMul", 128, 16, 8, 64)
    x = random_input(rng, (9, 128), np.float16)
    weights["residual"] = rng.standard_normal((9, 16)).astype(np.float16)
    attributes: dict[str, Any] = {"group_size": 64, "act_bits": 4, "act_group": 64, "subtract": 1}
    expected = reference.specquant_matmul(x.astype(np.float32), **weights, **attributes)
    size = float(np.abs(expected).max())
    for name in ("x", "basis", "coef", "scales", "bias", "qweight", "residual", "y"):
        y = Call(x, weights, offsets={name: 4}, **attributes).y
        np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=1e-3 * size, err_msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 48}, "group_size 48"),
        ({"act_bits": 9}, "act_bits must be 2 to 8"),
        ({"act_clip": 0.0}, "act_clip"),
        ({"hadamard": 48}, "hadamard must be"),
        ({"rank": 9}, "rank must be"),
        ({"prologue": 2}, "prologue must be"),
        ({"gate": 3}, "gate must be"),
        ({"gate": 1, "m": 7}, "with a gate, out-features must be even"),
        ({"gate": 2, "residual": np.zeros((2, 8), np.float32)}, "with a gate there is no residual"),
        ({"prologue": 1}, "norm is missing"),
        ({"path": "fast"}, "path must be"),
        ({"path": "matvec", "group_size": 8, "act_group": 8}, "does not take these sizes"),
    ],
)
def test_what_is_refused(rng: np.random.Generator, change: dict[str, Any], words: str) -> None:
    attributes: dict[str, Any] = {"group_size": 64, "act_bits": 4, "act_group": 64} | change
    small, m = attributes["group_size"] == 8, attributes.pop("m", 8)
    weights = random_weights(rng, "SpecQuantMatMul", 128, m, 8, 8 if small else 64)
    if "residual" in attributes:
        weights["residual"] = attributes.pop("residual")
    if "rank" in attributes:
        weights["rank"] = np.array([attributes.pop("rank")])
    with pytest.raises(SpecQuantError, match=words):
        Call(random_input(rng, (2, 128)), weights, **attributes)


def test_arrays_of_the_host_are_refused(rng: np.random.Generator) -> None:
    weights = {k: DeviceArray(v) for k, v in random_weights(rng, "Int4ResidualMatMul", 64, 8, 0).items()}
    with pytest.raises(SpecQuantError, match="x does not lie on the GPU"):
        library_cuda.layout(random_input(rng, (2, 64)), **weights)
    x = DeviceArray(random_input(rng, (2, 64)))
    with pytest.raises(SpecQuantError, match=r"scales is float32 \[8\]; it should be float16"):
        library_cuda.layout(x, **(weights | {"scales": DeviceArray(np.ones(8, np.float32))}))
