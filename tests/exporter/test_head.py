"""The quantised head: its levels, its digits, and the graph that multiplies with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import pack_group_scales, pack_int4
from specquant.custom_ops.reference import int4_residual_matmul, quantize_activation
from specquant.custom_ops.schema import OPS
from specquant.exporter.artifact import tensor_bytes
from specquant.exporter.families import family_of
from specquant.exporter.graph import build_model
from specquant.exporter.head import digits, group_of, head_linear, quantize_table, two_levels
from specquant.exporter.simulate import simulate
from tests.exporter.graph.running import Running
from tests.tiny import tiny_llama


def test_digits_hold_every_level() -> None:
    levels = np.arange(-119, 120, dtype=np.int8)
    high, low = digits(levels)
    for digit in (high, low):
        assert digit.min() >= -8
        assert digit.max() <= 7
    np.testing.assert_array_equal(16 * high.astype(int) + low, levels)


@pytest.mark.parametrize(("hidden", "group"), [(576, 64), (40, 40), (88, 8), (1152, 64)])
def test_groups_divide(hidden: int, group: int) -> None:
    assert group_of(hidden) == group


def test_a_size_without_groups_is_explained() -> None:
    with pytest.raises(SpecQuantError, match=r"hidden size of 84 has no groups of 8 .* --head-bits 16"):
        group_of(84)


@pytest.mark.parametrize(("bits", "largest"), [(8, 119), (4, 7)])
def test_the_error_is_at_most_half_a_step(rng: np.random.Generator, bits: int, largest: int) -> None:
    table = rng.standard_normal((4100, 48)).astype(np.float32)  # more rows than are quantised at a time
    table[7] = 0
    found = quantize_table(table, bits)
    assert (found.scales.shape, found.group_scales.shape) == ((4100,), (4100, 1))
    assert (found.group_scales == 1).all()
    assert np.abs(found.q).max() == largest
    step = np.abs(table).max(axis=1, keepdims=True) / largest
    error = np.abs(found.floats() - table)
    if bits == 8:
        assert (error <= 0.5 * step + 1e-3 * np.abs(table) + 1e-7).all()
    else:  # what is cut off may be more wrong, if the whole group is less
        plain = np.rint(table / np.where(step > 0, step, 1)) * step
        assert np.square(error).sum() < 0.99 * np.square(plain - table).sum()


@pytest.mark.parametrize("groups", [1, 2, 9])
def test_scales_of_two_levels_clip_nothing_more(rng: np.random.Generator, groups: int) -> None:
    free = (rng.uniform(0.2, 1, (500, groups)) * 10 ** rng.uniform(-3, 0, (500, 1))).astype(np.float32)
    group_scales, scales = two_levels(free)
    assert (group_scales.dtype, scales.dtype) == (np.int8, np.float16)
    assert group_scales.min() >= 1
    assert group_scales.max() <= (16 if groups > 1 else 1)
    products = scales.astype(np.float32)[:, None] * group_scales
    assert (products >= free * (1 - 2e-3)).all()  # but for the rounding of the largest to float16
    ratio = np.square(products).sum() / np.square(free).sum()
    assert ratio < (1.12 if groups > 1 else 1.01)


def test_eight_bits_cut_nothing_off(rng: np.random.Generator) -> None:
    table = (rng.standard_normal((300, 192)) * rng.uniform(0.1, 1, 192)).astype(np.float32)
    found = quantize_table(table, 8)
    step = np.repeat(found.scales.astype(np.float32)[:, None] * found.group_scales, 64, axis=1)
    assert (np.abs(found.floats() - table) <= 0.5 * step + 2e-3 * np.abs(table)).all()
    assert np.square(found.floats() - table).sum() < 1e-4 * np.square(table).sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_op_multiplies_what_the_table_says(rng: np.random.Generator, bits: int) -> None:
    table = rng.standard_normal((37, 128)).astype(np.float32)
    entry, group = head_linear(table, bits), 64
    x = rng.standard_normal((3, 128)).astype(np.float32)
    given = np.concatenate([x, x / 16], axis=-1) if bits == 8 else x
    bias = np.zeros(37, np.float32)
    groups = {"group_size": entry.group_size, "act_bits": entry.act_bits, "act_group": entry.act_group}
    weights = pack_int4(entry.q), pack_group_scales(entry.group_scales), entry.scales
    y = int4_residual_matmul(given, *weights, bias, **groups)
    q, scale, zero = quantize_activation(x, 8, group)
    read = np.repeat(scale, group, axis=1) * (q - np.repeat(zero, group, axis=1))
    expected = read @ quantize_table(table, bits).floats().T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_graph_equals_simulation(rng: np.random.Generator, tmp_path: Path, bits: int, tied: bool) -> None:
    """Of some models, one has no activation so near half a step that the order of summation moves it."""
    errors: list[float] = []
    while min(errors, default=1) > 1e-4 and len(errors) < 12:
        model, decoder = tiny_llama(int(rng.integers(2**31)), tied=tied)
        decoder = replace(decoder, config=replace(decoder.config, head_bits=bits))
        ids = rng.integers(3, 128, (1, 12))
        actual = Running(decoder, tmp_path).step(ids, [12])
        with torch.no_grad():
            exact = model(torch.from_numpy(ids)).logits.numpy()
            expected = simulate(model, family_of(model.config), decoder)(torch.from_numpy(ids)).logits.numpy()
        assert np.abs(expected - exact).max() > 1e-3 * np.abs(exact).max()
        errors.append(float(np.abs(actual - expected).max() / np.abs(expected).max()))
    assert min(errors) < 1e-4


def test_the_low_digits_count_a_sixteenth_by_their_norm() -> None:
    """What a runtime knows a head in two digits by (docs/formats.md)."""
    _, decoder = tiny_llama(3)
    graph = build_model(replace(decoder, config=replace(decoder.config, head_bits=8)), "float32", {}).graph
    (node,) = (node for node in graph if node.name == "lm_head")
    given = {tensor.name: value for tensor, value in zip(OPS[node.op_type].inputs, node.inputs, strict=True)}
    norm, group_scales = (given[name].const_value.numpy() for name in ("norm", "group_scales"))
    np.testing.assert_array_equal(norm[:64], decoder.final_norm)
    np.testing.assert_array_equal(16 * norm[64:], decoder.final_norm)
    high, low = np.split(group_scales, 2, axis=1)
    np.testing.assert_array_equal(high, low)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bytes_are_those_of_the_graph(bits: int, tied: bool) -> None:
    _, decoder = tiny_llama(3, tied=tied)
    recipe = {**decoder.recipe, "head_bits": bits}
    decoder = replace(decoder, config=replace(decoder.config, head_bits=bits), recipe=recipe)
    graph = build_model(decoder, "float32", {}).graph
    parts = ("lm_head", "model.embed_tokens")
    stored = sum(value.const_value.nbytes for name, value in graph.initializers.items() if name.startswith(parts))
    counted = tensor_bytes(decoder)
    assert counted["embedding"] + counted.get("lm_head", 0) == stored
