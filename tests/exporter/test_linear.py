"""One quantised call: what is stored, its simulation against the op's reference, and statistics of its inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import unpack_group_scales, unpack_int4
from specquant.custom_ops.reference import int4_residual_matmul, quantize_activation, specquant_matmul
from specquant.exporter.calibrate import InputStatistics
from specquant.exporter.decoder import QuantLinear
from specquant.exporter.kv import block_hadamard
from specquant.exporter.linear import QuantStage, StageWeights
from specquant.exporter.recipe import Recipe, preset
from specquant.exporter.simulate import fake_quantize, sim_linears
from tests.ops import random_input, random_weights

N, PARTS = 48, {"q_proj": 19, "k_proj": 7}
M = sum(PARTS.values())
QUICK = Recipe(a_bits=4, k=5, group_size=8, act_group=8, samples=1, sequence_length=16)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 8, 24])
def test_fake_quantize_is_the_reference(rng: np.random.Generator, bits: int, group: int) -> None:
    u = (rng.standard_normal((2, 5, N)) * np.exp(2 * rng.standard_normal(N))).astype(np.float32)
    u[0, 0] = np.abs(u[0, 0])  # its zero point is 0
    u[0, 1, :24] = 0  # a group that holds nothing
    q, scale, zero_point = quantize_activation(u, bits, group)
    per_group = (q.reshape(2, 5, -1, group or N) - zero_point[..., None]).astype(np.float32) * scale[..., None]
    actual = fake_quantize(torch.from_numpy(u), bits, group).numpy()
    np.testing.assert_array_equal(actual, per_group.reshape(u.shape))


def test_16_bits_are_left_alone(rng: np.random.Generator) -> None:
    u = torch.from_numpy(rng.standard_normal((3, N)))
    assert fake_quantize(u, 16, 8) is u


@pytest.mark.parametrize(("group_size", "act_group"), [(0, 0), (8, 8), (24, 8), (8, 24), (0, 8)])
@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize(("rank", "subtract"), [(0, False), (5, False), (5, True)])
@pytest.mark.parametrize(("hadamard", "act_clip"), [(0, 1.0), (16, 0.75)])
def test_simulation_is_the_op(
    rng: np.random.Generator,
    group_size: int,
    act_group: int,
    act_bits: int,
    rank: int,
    subtract: bool,
    hadamard: int,
    act_clip: float,
) -> None:
    """Values whose sums are exact: no order of summation moves a level."""
    w = random_weights(rng, "SpecQuantMatMul", N, M, rank, group_size)
    branch = {"basis": w["basis"], "coef": w["coef"]} if rank else {}
    groups: dict[str, Any] = {"group_size": group_size, "act_bits": act_bits, "act_group": act_group}
    groups |= {"act_clip": act_clip, "hadamard": hadamard}
    linear = QuantLinear(
        name="qkv",
        parts=PARTS,
        q=unpack_int4(w["qweight"], N, M),
        group_scales=unpack_group_scales(w["group_scales"], N // (group_size or N), M),
        scales=w["scales"],
        **groups,
        **branch,
        subtract=subtract,
        bias=w["bias"],
    )
    x = random_input(rng, (3, 4, N))
    residual = [w[name] for name in ("qweight", "group_scales", "scales", "bias")]
    if rank:
        y = specquant_matmul(x, w["basis"], w["coef"], w["rank"], *residual, **groups, subtract=int(subtract))
    else:
        y = int4_residual_matmul(x, *residual, **groups)
    modules, seen = sim_linears(linear), torch.from_numpy(x)
    actual = np.concatenate([modules[name](seen).numpy() for name in PARTS], -1)
    np.testing.assert_allclose(actual, y, rtol=0, atol=2e-6 * np.abs(y).max())
    other = torch.from_numpy(random_input(rng, (2, N)))
    fresh = sim_linears(linear)["q_proj"](other)
    assert torch.equal(modules["q_proj"](other), fresh)  # the part that is shared does not remember another input


def stage_inputs(rng: np.random.Generator, tokens: int = 300) -> tuple[StageWeights, torch.Tensor]:
    """Random weights, and inputs with a few strong common directions as activations have them."""
    x = rng.standard_normal((tokens, N)) + 6 * rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, N))
    matrix, bias = rng.standard_normal((N, M)), rng.standard_normal(M)
    tensors = (torch.from_numpy(a.astype(np.float32)) for a in (matrix, bias, x))
    return StageWeights(dict(PARTS), next(tensors), next(tensors)), next(tensors)


RECIPES = {
    "klt": QUICK,
    "dft": replace(QUICK, basis="dft", budget="act"),
    "paper": replace(preset("paper"), k=7, samples=1, sequence_length=16),
    "no branch": replace(QUICK, basis="none", subtract=False),
    "rtn": replace(QUICK, rounding="rtn"),
    "16 bit activations": replace(QUICK, a_bits=16),
    "not rotated": replace(QUICK, hadamard=0),
    "not clipped": replace(QUICK, clip_grid=(1.0,)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_stage_stores_what_it_says(rng: np.random.Generator, recipe: Recipe) -> None:
    weights, x = stage_inputs(rng)
    exact = x @ weights.matrix
    stage = QuantStage.build("block.qkv_proj", weights, InputStatistics.gather([x], "here"), recipe)
    linear = stage.to_linear()
    groups = N // recipe.group_size if recipe.group_size else 1
    assert (linear.q.dtype, linear.q.shape) == (np.int8, (N, M))
    assert -8 <= linear.q.min() < linear.q.max() <= 7
    assert (linear.scales.dtype, linear.scales.shape) == (np.float16, (M,))
    assert (linear.scales > 0).all()
    assert (linear.group_scales.dtype, linear.group_scales.shape) == (np.int8, (groups, M))
    assert linear.group_scales.min() >= 1
    assert linear.group_scales.max() <= (16 if groups > 1 else 1)
    rank = {"none": 0, "dft": 2 * recipe.k - 1, "klt": recipe.k}[recipe.basis]
    assert linear.subtract == (recipe.subtract and rank > 0)
    if linear.basis is None or linear.coef is None:
        assert rank == 0
    else:
        assert (linear.basis.dtype, linear.basis.shape) == (np.float16, (N, rank))
        assert (linear.coef.dtype, linear.coef.shape) == (np.float16, (rank, M))
    # The error that a model card shows is that of what is stored, over all tokens that were kept as a sample.
    assert weights.bias is not None
    y = torch.cat([module(x) for module in sim_linears(linear).values()], -1) - weights.bias
    error = float((y - exact).square().sum() / exact.square().sum())
    assert stage.error == pytest.approx(error, rel=1e-3)
    assert 1e-8 < error < 0.3


def test_the_branch_pays_where_directions_are_strong(rng: np.random.Generator) -> None:
    weights, x = stage_inputs(rng)
    stats = InputStatistics.gather([x], "here")
    error = {name: QuantStage.build(name, weights, stats, recipe).error for name, recipe in RECIPES.items()}
    assert error["klt"] < 0.2 * error["no branch"]


def test_rotation_pays_where_single_channels_are_large(rng: np.random.Generator) -> None:
    weights, x = stage_inputs(rng)
    x = x * torch.from_numpy(np.where(np.arange(N) % 8 == 3, 20, 1).astype(np.float32))
    stats = InputStatistics.gather([x], "here")
    plain = replace(QUICK, basis="none", subtract=False, group_size=0, act_group=0)
    error = {block: QuantStage.build("x", weights, stats, replace(plain, hadamard=block)).error for block in (0, 16)}
    assert error[16] < 0.8 * error[0]


def test_the_best_clip_is_chosen(rng: np.random.Generator) -> None:
    """Of a token's values, few are near the largest: where levels are few, they do better to span less."""
    weights, x = stage_inputs(rng)
    stats = InputStatistics.gather([x], "here")
    recipe = replace(QUICK, group_size=0, act_group=0, a_bits=2)
    alone = {c: QuantStage.build("x", weights, stats, replace(recipe, clip_grid=(c,))).error for c in recipe.clip_grid}
    stage = QuantStage.build("x", weights, stats, recipe)
    best = min(alone, key=lambda c: alone[c])
    assert (stage.error, stage.to_linear().act_clip) == (pytest.approx(alone[best]), best)
    assert best < 1


def test_statistics(rng: np.random.Generator) -> None:
    x = rng.standard_normal((60, 12)) * rng.uniform(0.1, 5, 12) + 0.5
    tensor = torch.from_numpy(x.astype(np.float32))
    stats = InputStatistics.gather([tensor[:20].view(4, 5, 12), tensor[20:].view(8, 5, 12)], "here", sample_rows=15)
    np.testing.assert_allclose(stats.moment, x.T @ x / 60, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.largest, np.abs(x).max(0), rtol=1e-6)
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    assert len(stats.sample) == 15
    rows = {row.tobytes() for row in tensor.numpy()}
    assert all(row.tobytes() in rows for row in stats.sample.numpy())
    factors = torch.from_numpy(rng.uniform(0.2, 4, 12).astype(np.float32))
    scaled, again = stats.scaled(factors), InputStatistics.gather([tensor / factors], "here", sample_rows=15)
    for name in ("moment", "largest", "mean"):
        torch.testing.assert_close(getattr(scaled, name), getattr(again, name), rtol=1e-4, atol=1e-5)


def test_statistics_beside_the_float_models_inputs(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((60, 16)).astype(np.float32))
    exact = x + torch.from_numpy(rng.standard_normal((60, 16)).astype(np.float32))
    stats = InputStatistics.gather([x[:20], x[20:]], "here", exact=[exact[:20].view(4, 5, 16), exact[20:]])
    assert InputStatistics.gather([x], "here").drift is None
    torch.testing.assert_close(stats.drift, x.T @ (exact - x) / 60, rtol=1e-4, atol=1e-5)
    factors = torch.from_numpy(rng.uniform(0.2, 4, 16).astype(np.float32))
    again = InputStatistics.gather([block_hadamard(x / factors, 8)], "here", exact=[block_hadamard(exact / factors, 8)])
    torch.testing.assert_close(stats.scaled(factors).rotated(8).drift, again.drift, rtol=1e-4, atol=1e-4)


def test_a_stage_makes_up_for_the_drift_of_its_input(rng: np.random.Generator) -> None:
    """Compared with what the float weights make of the float model's input."""
    weights, exact = stage_inputs(rng)
    x = exact * 0.9 + 0.05 * exact.roll(1, 1)
    stats = InputStatistics.gather([x], "here", exact=[exact])
    wanted, error = exact @ weights.matrix, {}
    for share in (0.0, 0.5, 1.0):
        stage = QuantStage.build("x", weights, stats, replace(QUICK, a_bits=16, asymmetry=share))
        assert weights.bias is not None
        y = torch.cat([module(x) for module in stage.modules().values()], -1) - weights.bias
        error[share] = float((y - wanted).square().sum() / wanted.square().sum())
    assert error[1.0] < error[0.5] < error[0.0]
    assert error[1.0] < 0.2 * error[0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_statistics_of_damaged_activations(rng: np.random.Generator, bad: float) -> None:
    x = torch.from_numpy(rng.standard_normal((30, 12)).astype(np.float32))
    x[int(rng.integers(30)), int(rng.integers(12))] = bad
    with pytest.raises(SpecQuantError, match=r"going into model\.layers\.3\.mlp\.down_proj hold NaN") as caught:
        InputStatistics.gather([x[:13], x[13:]], "model.layers.3.mlp.down_proj")
    assert "\n" not in str(caught.value)


def test_activations_that_float32_cannot_square(rng: np.random.Generator) -> None:
    """Finite as they came, no longer once smoothing has scaled them: GPTQ must not see that."""
    weights, x = stage_inputs(rng)
    stats = InputStatistics.gather([x], "here").scaled(torch.full((N,), 1e-20))
    with pytest.raises(SpecQuantError, match=r"going into block\.qkv_proj are too large for float32"):
        QuantStage.build("block.qkv_proj", weights, stats, QUICK)
