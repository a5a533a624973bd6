"""Ranks by what they are worth: the sharing out, the worth against autograd, and what a model becomes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import QuantLinear
from specquant.exporter.families import family_of
from specquant.exporter.quantize import quantize
from specquant.exporter.ranks import Branch, _add_gradients, allot, spread_ranks
from specquant.exporter.recipe import Recipe
from tests.model_folder import VOCAB

RECIPE = Recipe(k=8, ranks="fisher", group_size=8, act_group=8, samples=8, sequence_length=32)


@pytest.fixture
def tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(3, VOCAB - 1, (8, 32)))


@given(st.data())
def test_no_step_would_be_worth_more_elsewhere(data: st.DataObject) -> None:
    k = {"a": data.draw(st.integers(1, 32)), "b": data.draw(st.integers(1, 32))}
    branches = {}
    for place in [(i, stage) for i in range(3) for stage in k]:
        drawn = data.draw(st.lists(st.floats(0, 10), min_size=1, max_size=80))
        eigenvalues = torch.tensor(sorted(drawn, reverse=True)[: 2 * k[place[1]]])
        branches[place] = Branch(data.draw(st.integers(1, 50)), eigenvalues, weight=data.draw(st.floats(0, 5)))
    ranks = allot(branches, k)
    spare = sum((k[stage] - ranks[i, stage]) * branch.columns for (i, stage), branch in branches.items())
    assert spare >= 0
    for (i, stage), branch in branches.items():
        step, most = max(1, round(k[stage] / 4)), min(2 * k[stage], len(branch.eigenvalues))
        assert min(max(1, round(k[stage] / 2)), most) <= ranks[i, stage] <= most
        if ranks[i, stage] + step > most or branch.columns * step > spare:
            continue  # it could not have had one more
        raise AssertionError("numbers are left that a branch could have had")


def test_directions_go_where_they_are_worth_most() -> None:
    flat, steep = torch.full((16,), 1.0), torch.tensor([100.0] * 2 + [0.0] * 14)
    branches = {(0, "a"): Branch(10, flat, 1.0), (0, "b"): Branch(10, steep, 1.0), (1, "a"): Branch(10, flat, 0.1)}
    assert allot(branches, {"a": 8, "b": 8}) == {(0, "a"): 16, (0, "b"): 4, (1, "a"): 4}


def test_gradients_are_those_of_autograd(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """For down_proj of the last block, by the chain rule through norm and head, at the labels that were drawn."""
    family, seen = family_of(llama.config), []
    branches = {(1, "down_proj"): Branch(1, torch.ones(1))}

    def keep(_module: torch.nn.Module, _inputs: Any, y: Any) -> None:
        seen.append(y[0] if isinstance(y, tuple) else y)

    hook = llama.model.layers[1].register_forward_hook(keep)
    _add_gradients(llama, family, branches, tokens[:2], seed=3)
    hook.remove()
    generator, expected = torch.Generator().manual_seed(3), 0.0
    for hidden in seen:  # down_proj's output reaches the loss through the block's output alone
        h = hidden.detach().requires_grad_()
        logits = llama.lm_head(llama.model.norm(h))[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        assert h.grad is not None
        expected += float(h.grad.double().square().sum())
    assert branches[1, "down_proj"].gradients == pytest.approx(expected, rel=1e-4)


def test_the_model_is_left_as_it_was(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    wanted = {name: p.requires_grad for name, p in llama.named_parameters()}
    with torch.inference_mode():
        first = spread_ranks(llama, family_of(llama.config), RECIPE, tokens)
    assert first == spread_ranks(llama, family_of(llama.config), RECIPE, tokens)
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
        assert parameter.requires_grad is wanted[name]
        assert parameter.grad is None


def test_branches_have_the_size_they_would_have_had(model_folder: Path, tokens: torch.Tensor) -> None:
    def stored(recipe: Recipe) -> tuple[int, set[int]]:
        decoder = quantize(LlamaForCausalLM.from_pretrained(model_folder), recipe, tokens)
        bases = [(e.basis, e.coef) for layer in decoder.layers for e in layer.linears if isinstance(e, QuantLinear)]
        return sum(b.size + c.size for b, c in bases if b is not None and c is not None), {
            b.shape[1] for b, _ in bases if b is not None
        }

    size, ranks = stored(RECIPE)
    uniform, same = stored(replace(RECIPE, ranks="uniform"))
    assert same == {8}
    assert len(ranks) > 1
    assert min(ranks) >= 4
    assert max(ranks) <= 16
    assert 0.9 * uniform < size <= uniform


def test_a_stage_in_float_has_no_part_in_it(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    recipe = replace(RECIPE, overrides={"down_proj": {"w_bits": 16, "a_bits": 16}})
    ranks = spread_ranks(llama, family_of(llama.config), recipe, tokens)
    assert {stage for _, stage in ranks} == {"qkv_proj", "o_proj", "gate_up_proj"}


def test_it_needs_a_basis_that_the_data_decides() -> None:
    with pytest.raises(SpecQuantError, match="ranks fisher needs the basis klt"):
        Recipe(basis="dft", ranks="fisher")
