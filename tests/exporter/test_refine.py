"""End-to-end refinement, on a tiny Llama whose quantised twin has much to learn."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import Decoder, QuantLinear
from specquant.exporter.families import family_of
from specquant.exporter.quantize import quantize
from specquant.exporter.recipe import Recipe
from specquant.exporter.refine import refine
from specquant.exporter.simulate import simulate
from tests.model_folder import VOCAB, fresh_seed, random_llama

# Coarse weights, which leave much to learn, and no window seen twice, or a random model is learnt by heart.
RECIPE = Recipe(  # like the preset that refines
    smooth=True,
    descents=0,
    asymmetry=0.0,
    k=5, group_size=0, act_group=0, a_bits=16, rounding="rtn", samples=352, sequence_length=32, refine_steps=40,
    refine_batch=8,
)  # fmt: skip
HELD = 352 // 16


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(3, VOCAB - 1, (352, 32)))


@torch.no_grad()
def divergence(model: LlamaForCausalLM, decoder: Decoder, tokens: torch.Tensor) -> float:
    """Mean over tokens of KL(model ‖ decoder), in float64 and from the definition."""
    student = simulate(copy.deepcopy(model), family_of(model.config), decoder)
    p, q = (torch.softmax(m(tokens).logits.double(), -1) for m in (model, student))
    return float((p * (p / q).log()).sum(-1).mean())


def quantised(model: LlamaForCausalLM, recipe: Recipe, tokens: torch.Tensor) -> Decoder:
    return quantize(copy.deepcopy(model), recipe, tokens[:32])


@pytest.fixture
def models(llama: LlamaForCausalLM) -> list[LlamaForCausalLM]:
    """Some random models have little to learn: one of three is enough."""
    return [llama, random_llama(fresh_seed()), random_llama(fresh_seed())]


def refined(
    models: list[LlamaForCausalLM], recipe: Recipe, tokens: torch.Tensor, held: int, share: float
) -> tuple[LlamaForCausalLM, Decoder, Decoder]:
    """The first of the models that comes so much closer on windows that were not trained on, before and after."""
    for model in models:
        before = quantised(model, recipe, tokens)
        after = refine(model, before, recipe, tokens)
        if divergence(model, after, tokens[:held]) < share * divergence(model, before, tokens[:held]):
            return model, before, after
    pytest.fail(f"none of {len(models)} models came closer than {share} of what it was")


def linears(decoder: Decoder) -> list[QuantLinear]:
    return [x for layer in decoder.layers for x in layer.linears if isinstance(x, QuantLinear)]


def test_comes_closer_to_the_float_model(models: list[LlamaForCausalLM], tokens: torch.Tensor) -> None:
    all_weights = [copy.deepcopy(model.state_dict()) for model in models]
    llama, before, after = refined(models, RECIPE, tokens, HELD, 0.97)
    weights = all_weights[models.index(llama)]
    for a, b in zip(linears(before), linears(after), strict=True):
        assert set(np.unique(b.q)) <= set(range(-8, 8))
        assert (b.scales > 0).all()
        assert set(np.unique(b.group_scales)) <= set(range(1, 17))
        for name in ("q", "group_scales", "scales", "basis", "coef", "bias"):
            x, y = getattr(a, name), getattr(b, name)
            if x is None:  # the draw has no such part
                assert y is None
                continue
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert np.isfinite(y.astype(np.float32)).all()
        assert not np.array_equal(a.scales, b.scales)
        assert not np.array_equal(a.coef, b.coef)
    assert any(not np.array_equal(x.input_norm, y.input_norm) for x, y in zip(before.layers, after.layers, strict=True))
    for name, weight in llama.state_dict().items():  # the teacher learns nothing
        assert torch.equal(weight, weights[name])


def test_integers_move(models: list[LlamaForCausalLM], rng: np.random.Generator) -> None:
    """To where they serve the whole model better than where rounding to nearest had put them."""
    recipe = replace(RECIPE, refine_steps=110)
    tokens = torch.from_numpy(rng.integers(3, VOCAB - 1, (1000, 32)))
    _, before, after = refined(models, recipe, tokens, 60, 0.85)
    moved = [float((a.q != b.q).mean()) for a, b in zip(linears(before), linears(after), strict=True)]
    assert 0.001 < np.mean(moved) < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"basis": "none", "subtract": False},
        {"basis": "dft", "group_size": 8, "overrides": {"o_proj": {"w_bits": 16}}},
    ],
)
def test_other_recipes(models: list[LlamaForCausalLM], tokens: torch.Tensor, changes: dict[str, object]) -> None:
    """What is stored is what was trained: had it been put back differently, nothing would come closer."""
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
    _, before, after = refined(models, recipe, tokens, HELD, 1.0)
    assert after is not before


def test_clips_are_learnt(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """From one that cuts far too much, with nothing else to learn: 8-bit activations need no clip."""
    recipe = replace(RECIPE, a_bits=8, refine_steps=60, refine_lr=0.02)
    before = quantised(llama, recipe, tokens)
    layers = [
        replace(layer, **{f: replace(getattr(layer, f), act_clip=0.5) for f in ("qkv", "o", "gate_up", "down")})
        for layer in before.layers
    ]
    before = replace(before, layers=layers)
    after = refine(llama, before, recipe, tokens)
    assert np.mean([x.act_clip for x in linears(after)]) > 0.54
    assert all(x.act_clip <= 1 for x in linears(after))


def test_group_scales_are_learnt(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """From ones of which every other is a third too large: those fall, and all stay whole numbers."""
    recipe = replace(RECIPE, group_size=8, refine_steps=60, refine_lr=0.01)
    before = quantised(llama, recipe, tokens)

    def spoilt(x: QuantLinear) -> QuantLinear:
        wrong = x.group_scales.astype(np.float64)
        wrong[1::2] = np.clip(np.rint(wrong[1::2] * 4 / 3), 1, 16)
        return replace(x, group_scales=wrong.astype(np.int8))

    layers = [
        replace(layer, **{f: spoilt(getattr(layer, f)) for f in ("qkv", "o", "gate_up", "down")})
        for layer in before.layers
    ]
    before = replace(before, layers=layers)
    after = refine(llama, before, recipe, tokens)
    assert divergence(llama, after, tokens[:HELD]) < 0.95 * divergence(llama, before, tokens[:HELD])
    changes = [b.group_scales / a.group_scales - 1 for a, b in zip(linears(before), linears(after), strict=True)]
    assert np.mean([change[1::2].mean() - change[::2].mean() for change in changes]) < -0.005
    assert all(x.group_scales.min() >= 1 and x.group_scales.max() <= 16 for x in linears(after))


def test_a_run_repeats(model_folder: Path, tokens: torch.Tensor) -> None:
    recipe = replace(RECIPE, refine_steps=4)
    runs = []
    for _ in range(2):
        model = LlamaForCausalLM.from_pretrained(model_folder).eval()
        runs.append(linears(refine(model, quantised(model, recipe, tokens), recipe, tokens)))
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a.q, b.q)
        np.testing.assert_array_equal(a.scales, b.scales)
        np.testing.assert_array_equal(a.group_scales, b.group_scales)
        np.testing.assert_array_equal(a.coef, b.coef)


def test_what_is_worse_is_not_kept(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """At a learning rate that ruins the model: what went in comes back."""
    recipe = replace(RECIPE, refine_steps=15, refine_lr=0.2)
    before = quantised(llama, recipe, tokens)
    assert refine(llama, before, recipe, tokens) is before


@pytest.mark.parametrize("batch", [1, 8, 15, 16, 40])
def test_too_few_samples(batch: int) -> None:
    """The number that the error asks for is enough, and one less is not."""
    with pytest.raises(SpecQuantError, match="are too few") as e:
        replace(RECIPE, refine_batch=batch, samples=1)
    enough = int(str(e.value).rsplit("--samples ", 1)[1].split()[0])
    replace(RECIPE, refine_batch=batch, samples=enough)
    with pytest.raises(SpecQuantError, match="are too few"):
        replace(RECIPE, refine_batch=batch, samples=enough - 1)
    with pytest.raises(SpecQuantError, match=f"use --refine-samples {enough} or more"):
        replace(RECIPE, refine_batch=batch, samples=400, refine_samples=enough - 1)
    replace(RECIPE, refine_batch=batch, samples=1, refine_samples=enough)
