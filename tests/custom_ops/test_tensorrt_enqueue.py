"""The compiled plugins of linears as TensorRT uses them, against the reference (tests/tensorrt_harness.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops.schema import GATES, OPS
from tests.cuda_arrays import EMULATED, POISON, DeviceArray, GpuArray, require_kernels
from tests.ops import REFERENCE, random_input, random_weights
from tests.tensorrt_harness import Harness, computed, opened, refusal, tensors_of

require_kernels()


def multiplied(
    harness: Harness,
    op: str,
    x: NDArray[Any],
    weights: dict[str, NDArray[Any]],
    attributes: dict[str, Any],
) -> NDArray[Any]:
    """y of a linear; norm and residual are dummies unless they are among the weights."""
    dummies = {"norm": np.zeros(1, np.float32), "residual": np.zeros(1, x.dtype)}
    inputs = [x, *(weights.get(t.name, dummies.get(t.name)) for t in OPS[op].inputs[1:])]
    m = len(weights["scales"])
    y = np.full((*x.shape[:-1], m // 2 if attributes.get("gate") else m), np.nan, x.dtype)
    most = {0: (x.shape[0] + 100, *x.shape[1:])}
    if "residual" in weights:
        most[len(inputs) - 1] = (x.shape[0] + 100, *y.shape[1:])
    return computed(harness, op, inputs, [y], attributes, most)[0]


LINEARS = ("SpecQuantMatMul", "Int4ResidualMatMul")


@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("act_bits", "group", "act_group", "hadamard", "clip"),
    [(8, 64, 64, 64, 1.0), (4, 64, 64, 0, 0.9), (4, 0, 0, 16, 1.0), (8, 32, 64, 0, 1.0), (16, 64, 0, 0, 1.0)],
)
@pytest.mark.parametrize("tokens", [1, 37])
def test_linears(
    rng: np.random.Generator,
    harness: Harness,
    op: str,
    float_type: type[np.floating[Any]],
    act_bits: int,
    group: int,
    act_group: int,
    hadamard: int,
    clip: float,
    tokens: int,
) -> None:
    attributes = {"group_size": group, "act_bits": act_bits, "act_group": act_group, "act_clip": clip}
    attributes |= {"hadamard": hadamard} | ({"subtract": 1} if op == "SpecQuantMatMul" else {})
    weights = random_weights(rng, op, 128, 72, 5, group)
    x = random_input(rng, (tokens, 128), float_type)
    expected = REFERENCE[op](x, *weights.values(), **attributes)
    actual = multiplied(harness, op, x, weights, attributes)
    bound = 2e-3 if float_type == np.float16 or act_bits == 16 else 1e-4
    np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("prologue", [0, 1])
@pytest.mark.parametrize("tokens", [1, 37])
def test_prologue_and_residual(
    rng: np.random.Generator,
    harness: Harness,
    op: str,
    float_type: type[np.floating[Any]],
    prologue: int,
    tokens: int,
) -> None:
    """16-bit activations: a prologue's last bit moves no level then."""
    attributes = {"group_size": 64, "act_bits": 16, "prologue": prologue, "epsilon": 0.3}
    weights = random_weights(rng, op, 128, 72, 5, 64)
    x = random_input(rng, (1, tokens, 128), float_type)
    weights |= {"norm": rng.uniform(0.2, 3, 128 if prologue == 1 else 1).astype(np.float32)}
    weights |= {"residual": (rng.standard_normal((1, tokens, 72)) * 50).astype(float_type)}
    expected = REFERENCE[op](x, **weights, **attributes)
    actual = multiplied(harness, op, x, weights, attributes)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("gate", range(1, len(GATES)))
@pytest.mark.parametrize("tokens", [1, 37])
def test_a_gate(
    rng: np.random.Generator, harness: Harness, op: str, float_type: type[np.floating[Any]], gate: int, tokens: int
) -> None:
    attributes = {"group_size": 64, "act_bits": 4, "act_group": 64, "gate": gate}
    weights = random_weights(rng, op, 128, 72, 5, 64)
    x = random_input(rng, (1, tokens, 128), float_type)
    expected = REFERENCE[op](x, *weights.values(), **attributes)
    actual = multiplied(harness, op, x, weights, attributes)
    assert actual.shape == expected.shape == (1, tokens, 36)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_leading_axes_and_no_tokens(rng: np.random.Generator, harness: Harness) -> None:
    attributes = {"group_size": 64, "act_bits": 8, "act_group": 64, "subtract": 1}
    weights = random_weights(rng, "SpecQuantMatMul", 64, 40, 5, 64)
    x = random_input(rng, (2, 3, 64))
    expected = REFERENCE["SpecQuantMatMul"](x, *weights.values(), **attributes)
    actual = multiplied(harness, "SpecQuantMatMul", x, weights, attributes)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert multiplied(harness, "SpecQuantMatMul", x[:0], weights, attributes).shape == (0, 3, 40)


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 19, 128), (3, 0, 128), (1, 5, 72)])
@pytest.mark.parametrize("rank", [5, 33])
def test_a_branch(
    rng: np.random.Generator, harness: Harness, shape: tuple[int, ...], float_type: type[np.floating[Any]], rank: int
) -> None:
    op = "SpectralBranch"
    weights = random_weights(rng, op, shape[-1], 40, rank)
    x = random_input(rng, shape, float_type)
    outputs: list[NDArray[Any] | int] = [np.full((*shape[:-1], width), np.nan, float_type) for width in (40, rank)]
    most = {0: (shape[0] + 100, *shape[1:])}
    found = computed(harness, op, [x, *weights.values()], outputs, {}, most)
    bound = 2e-3 if float_type == np.float16 else 1e-5
    for actual, expected in zip(found, REFERENCE[op](x, **weights), strict=True):
        largest = np.abs(expected.astype(np.float32)).max(initial=0)
        np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound * largest)


def test_a_branch_that_is_refused(rng: np.random.Generator, harness: Harness) -> None:
    op = "SpectralBranch"
    x, weights = random_input(rng, (5, 64), np.float16), random_weights(rng, op, 64, 40, 5)
    wrong = weights | {"basis": np.concatenate([weights["basis"]] * 2)}
    assert refusal(harness, op, [x, *wrong.values()], {}, 2) == b"SpectralBranch: basis or coef has another shape"
    assert opened(harness, op, {"subtract": 1}) is None
    assert harness[0].harness_last() == b"SpectralBranch: subtract"
    too_many = {"basis": np.zeros((64, 65), np.float16), "coef": np.zeros((65, 40), np.float16)}
    said = refusal(harness, op, [x, *(weights | too_many).values()], {}, 2)
    assert said == b"SpectralBranch: the basis must have 0 to in-features columns, at most 4096"


@pytest.mark.skipif(EMULATED, reason="streams are a GPU's")
def test_clones_on_several_streams(rng: np.random.Generator, harness: Harness) -> None:
    """Attached clones, each with a workspace and a stream of its own, all at work at once."""
    library, _ = harness
    op, attributes = "SpecQuantMatMul", {"group_size": 64, "act_bits": 8, "act_group": 64, "hadamard": 64}
    weights = random_weights(rng, op, 512, 200, 5, 64)
    dummies = [np.zeros(1, np.float32), np.zeros(1, np.float32)]
    shared = [DeviceArray(array) for array in (*weights.values(), *dummies)]
    calls = []
    for tokens in (1, 300, 33, 7):
        x, y = random_input(rng, (tokens, 512)), np.full((tokens, 200), np.nan, np.float32)
        arrays = [DeviceArray(x), *shared, DeviceArray(y)]
        tensors = tensors_of([x, *weights.values(), *dummies, y], arrays, {})
        plugin, stream = ctypes.c_void_p(opened(harness, op, attributes)), ctypes.c_void_p()
        GpuArray.driver.call("cuStreamCreate", ctypes.byref(stream), 1)
        size = library.harness_workspace(plugin, tensors, len(arrays) - 1, 1)
        space = DeviceArray(np.full(size, POISON, np.uint8))
        calls.append((x, arrays, tensors, plugin, stream, space))
    for _ in range(20):
        for _, arrays, tensors, plugin, stream, space in calls:
            place = ctypes.c_void_p(space.__cuda_array_interface__["data"][0])
            assert library.harness_enqueue(plugin, tensors, len(arrays) - 1, 1, place, stream) == 0
    for x, arrays, _, _, stream, _ in calls:
        GpuArray.driver.call("cuStreamSynchronize", stream)
        expected = REFERENCE[op](x, **weights, **attributes)
        np.testing.assert_allclose(arrays[-1].numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_every_attribute_of_a_linear_survives(rng: np.random.Generator, harness: Harness) -> None:
    """Serialised and read again, each changes what is computed."""
    base = {"group_size": 64, "act_bits": 8, "act_group": 64, "act_clip": 1.0, "hadamard": 0, "subtract": 0}
    base |= {"prologue": 1, "epsilon": 1e-5, "gate": 1}
    assert list(base) == [a.name for a in OPS["SpecQuantMatMul"].attributes]
    other = {"act_bits": 4, "act_clip": 0.7, "hadamard": 16, "subtract": 1, "prologue": 0, "epsilon": 0.5, "gate": 2}
    weights = random_weights(rng, "SpecQuantMatMul", 64, 40, 5, 64) | {"norm": np.full(64, 2, np.float32)}
    x = random_input(rng, (5, 64))
    plain = multiplied(harness, "SpecQuantMatMul", x, weights, base)
    for name, value in other.items():
        assert np.abs(multiplied(harness, "SpecQuantMatMul", x, weights, base | {name: value}) - plain).max() > 0


def test_what_is_refused_is_logged(rng: np.random.Generator, harness: Harness) -> None:
    library, _ = harness
    op = "Int4ResidualMatMul"
    assert opened(harness, op, {"subtract": 1}) is None
    assert library.harness_last() == b"Int4ResidualMatMul: subtract"
    weights = random_weights(rng, op, 64, 40, 5)
    inputs = [random_input(rng, (5, 64)), *weights.values(), np.zeros(1, np.float32), np.zeros(1, np.float32)]
    assert refusal(harness, op, inputs, {"act_bits": 9}, 1) == b"Int4ResidualMatMul: act_bits must be 2 to 8, or 16"
    for index, name in ((1, "qweight"), (2, "group_scales"), (4, "bias")):
        wrong = [np.concatenate([a, a]) if i == index else a for i, a in enumerate(inputs)]
        assert refusal(harness, op, wrong, {}, 1) == f"{op}: {name} has another shape".encode()
    wrong = [*inputs[:3], inputs[3][None], *inputs[4:]]  # as scales were of one level
    assert refusal(harness, op, wrong, {}, 1) == b"Int4ResidualMatMul: x or scales has another number of axes"
    assert refusal(harness, op, inputs, {"prologue": 1}, 1) == b"Int4ResidualMatMul: norm has another shape"
    wrong = [*inputs[:-1], np.zeros((4, 40), np.float32)]
    assert refusal(harness, op, wrong, {}, 1) == b"Int4ResidualMatMul: residual has another shape"
    assert refusal(harness, op, [inputs[0].astype(np.int8), *inputs[1:]], {}, 1) == b""  # a type is no error
