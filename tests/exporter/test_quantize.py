"""The loop over blocks, on a tiny Llama with biases and grouped heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import FloatLinear, QuantLinear
from specquant.exporter.families import family_of
from specquant.exporter.quantize import quantize
from specquant.exporter.recipe import Recipe, float_recipe
from specquant.exporter.simulate import simulate
from tests.model_folder import CONTEXT, VOCAB

RECIPE = Recipe(a_bits=4, k=5, group_size=8, act_group=8, samples=8, sequence_length=32)


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(3, VOCAB - 1, (8, 32)))


def arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif is_dataclass(value):
        for item in fields(value):
            yield from arrays(getattr(value, item.name))
    elif isinstance(value, list):
        for item in value:
            yield from arrays(item)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    return model(tokens).logits.double().numpy()


def test_the_same_twice(model_folder: Path, tokens: torch.Tensor) -> None:
    runs = [quantize(LlamaForCausalLM.from_pretrained(model_folder), RECIPE, tokens) for _ in range(2)]
    first, second = (list(arrays(decoder)) for decoder in runs)
    assert len(first) == len(second) > 2 * (4 * 4 + 2)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("subtract", [False, True])
def test_smoothing_folds_away(
    model_folder: Path, llama: LlamaForCausalLM, tokens: torch.Tensor, subtract: bool
) -> None:
    """A branch of full rank holds the whole weight, to float16: then what is left of smoothing must be nothing."""
    overrides = {"down_proj": {"k": 88}}
    recipe = Recipe(
        smooth=True,
        asymmetry=0.0,
        k=64,
        a_bits=16,
        head_bits=16,
        group_size=8,
        act_group=8,
        subtract=subtract,
        overrides=overrides,
    )
    expected = logits(llama, tokens)
    norm = llama.model.layers[0].input_layernorm.weight.detach().numpy().copy()
    decoder = quantize(llama, recipe, tokens)
    ratio = norm / decoder.layers[0].input_norm
    assert ratio.max() / ratio.min() > 2  # it did smooth
    fresh = LlamaForCausalLM.from_pretrained(model_folder)
    actual = logits(simulate(fresh, family_of(fresh.config), decoder), tokens)
    assert np.linalg.norm(actual - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("kv_bits", [4, 16])
def test_asymmetry_leads_back_to_the_float_model(
    model_folder: Path, llama: LlamaForCausalLM, tokens: torch.Tensor, kv_bits: int
) -> None:
    """On the calibration tokens, which are more than any input has features."""
    expected, error = logits(llama, tokens), {}
    for share in (0.0, 1.0):
        recipe = replace(RECIPE, asymmetry=share, kv_bits=kv_bits, head_bits=16)
        decoder = quantize(LlamaForCausalLM.from_pretrained(model_folder), recipe, tokens)
        fresh = LlamaForCausalLM.from_pretrained(model_folder)
        actual = logits(simulate(fresh, family_of(fresh.config), decoder), tokens)
        error[share] = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 0 < error[1.0] < 0.95 * error[0.0]


def test_floats_are_the_models_own(llama: LlamaForCausalLM) -> None:
    weights = {name: tensor.numpy().copy() for name, tensor in llama.state_dict().items()}
    decoder = quantize(llama, float_recipe())
    qkv, down = decoder.layers[1].qkv, decoder.layers[1].down
    assert isinstance(qkv, FloatLinear)
    assert isinstance(down, FloatLinear)
    prefix = "model.layers.1.self_attn"
    parts = [f"{prefix}.{name}_proj" for name in "qkv"]
    np.testing.assert_array_equal(qkv.weight, np.concatenate([weights[f"{p}.weight"].T for p in parts], 1))
    np.testing.assert_array_equal(qkv.bias, np.concatenate([weights[f"{p}.bias"] for p in parts]))
    np.testing.assert_array_equal(down.weight, weights["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(decoder.final_norm, weights["model.norm.weight"])
    np.testing.assert_array_equal(decoder.embedding, weights["model.embed_tokens.weight"])
    assert decoder.lm_head is None


def test_what_is_reported(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    steps: list[tuple[int, int]] = []
    recipe = replace(RECIPE, smooth=True)
    decoder = quantize(llama, recipe, tokens, progress=lambda done, total, what: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    linears = [linear for layer in decoder.layers for linear in layer.linears]
    names = {linear.name for linear in linears}
    assert len(names) == 8
    assert "model.layers.1.mlp.gate_up_proj" in names
    for linear in linears:
        assert isinstance(linear, QuantLinear)
        assert linear.error is not None
        assert 1e-7 < linear.error < 0.5
        assert linear.alpha in recipe.smooth_grid


def test_overrides_hold_for_their_stage(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    overrides = {
        "down_proj": {"a_bits": 5, "group_size": 0, "basis": "none", "subtract": False},
        "o_proj": {"w_bits": 16, "a_bits": 16},
    }
    decoder = quantize(llama, Recipe(k=5, group_size=8, act_group=8, overrides=overrides), tokens)
    for layer in decoder.layers:
        assert isinstance(layer.o, FloatLinear)
        assert isinstance(layer.down, QuantLinear)
        assert isinstance(layer.qkv, QuantLinear)
        assert (layer.down.act_bits, layer.down.group_size, layer.down.basis) == (5, 0, None)
        assert (layer.qkv.act_bits, layer.qkv.group_size) == (Recipe().a_bits, 8)


def test_a_shorter_context(llama: LlamaForCausalLM) -> None:
    with pytest.raises(SpecQuantError, match=f"context length {CONTEXT + 1} is not in 1…{CONTEXT}"):
        quantize(llama, float_recipe(), context_length=CONTEXT + 1)
    decoder = quantize(llama, float_recipe(), context_length=20)
    assert decoder.config.context_length == 20
    assert decoder.rope_cos.shape[-2:] == (20, 8)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_named(llama: LlamaForCausalLM, tokens: torch.Tensor, name: str, bad: float) -> None:
    with torch.no_grad():
        llama.get_parameter(name)[-1] = bad  # of the embedding: a token that the text does not hold
    with pytest.raises(SpecQuantError, match=f"weights of {name.removesuffix('.weight')}.* hold NaN") as caught:
        quantize(llama, RECIPE, tokens)
    assert "\n" not in str(caught.value)


def test_damaged_activations_are_named(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight *= 1e30
    with pytest.raises(SpecQuantError, match=r"going into model\.layers\.1\.mlp\.gate_up_proj hold NaN"):
        quantize(llama, RECIPE, tokens)
