"""How many directions each linear's branch gets, all branches together as large as with k everywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specquant.exporter.basis import klt_basis
from specquant.exporter.calibrate import InputStatistics, first_block_inputs
from specquant.exporter.families import Family, layer_attention, text_config
from specquant.exporter.linear import StageWeights
from specquant.exporter.recipe import Recipe

Place = tuple[int, str]  # index of the block, name of the stage

_LEAST, _MOST, _STEP = 0.5, 2, 0.25  # of k: what a branch gets at least and at most, and in which steps
_TOKENS = 32768  # of the calibration, that gradients are taken at


@dataclass
class Branch:
    """What a linear's branch costs and is worth."""

    columns: int  # N + M: numbers that one more direction stores
    eigenvalues: Tensor  # [2k or N] of the input's second moment, largest first
    weight: float = 0.0  # ΔKL of a unit of energy that is left to the 4-bit levels
    rank: int = 0
    gradients: float = field(default=0.0, repr=False)  # Σ ‖∂L/∂y‖² over tokens

    def gain(self, step: int) -> float:
        """ΔKL that the next `step` directions save, per number stored."""
        energy = float(self.eigenvalues[self.rank : self.rank + step].sum())
        return self.weight * energy / (step * self.columns)


@torch.no_grad()
def spread_ranks(model: nn.Module, family: Family, recipe: Recipe, tokens: Tensor) -> dict[Place, int]:
    """(block, stage) → rank, for the stages whose basis is klt.

    The 4-bit levels err by a share of the energy that the branch leaves them, Σ_{i > r} λ_i. With an error δy of
    independent entries the distribution of the next token moves by KL ≈ ½ Σ E[g²] E[δy²], g = ∂ log p(label) / ∂y for
    labels drawn from the model itself (Fisher's information). So a direction of the input is worth
    λ · mean(w²) · E‖g‖², and directions are given out by worth per number stored. The model is left as it was.

    tokens int64 [samples, length].
    """
    branches = dict(_branches(model, family, recipe, tokens))
    _add_gradients(model, family, branches, tokens[: max(1, _TOKENS // tokens.shape[1])], recipe.seed)
    for branch in branches.values():
        branch.weight *= branch.gradients
    return allot(branches, {stage.name: recipe.at(stage.name).k for stage in family.stages})


def allot(branches: dict[Place, Branch], k: dict[str, int]) -> dict[Place, int]:
    """The ranks: k / 2 everywhere, then steps of k / 4 to whom they are worth most, until the numbers of k everywhere
    are stored; at most 2k, and never more than there are features."""
    steps = {stage: max(1, round(_STEP * size)) for stage, size in k.items()}
    left = 0
    for (_, stage), branch in branches.items():
        branch.rank = min(max(1, round(_LEAST * k[stage])), len(branch.eigenvalues))
        left += (k[stage] - branch.rank) * branch.columns

    def fits(place: Place) -> bool:
        branch, step = branches[place], steps[place[1]]
        most = min(_MOST * k[place[1]], len(branch.eigenvalues))
        return branch.rank + step <= most and step * branch.columns <= left

    while able := [place for place in branches if fits(place)]:
        best = max(able, key=lambda place: branches[place].gain(steps[place[1]]))
        branches[best].rank += steps[best[1]]
        left -= steps[best[1]] * branches[best].columns
    return {place: branch.rank for place, branch in branches.items()}


def _branches(model: nn.Module, family: Family, recipe: Recipe, tokens: Tensor) -> Iterator[tuple[Place, Branch]]:
    """Spectra and mean squared weights, block by block over the float model."""
    base, text = model.get_submodule(family.decoder), text_config(model.config)
    hidden, ropes = first_block_inputs(model, family, tokens)
    layers = base.get_submodule(family.layers).children()
    for index, (layer, (window, rotary)) in enumerate(zip(layers, layer_attention(text), strict=True)):
        run = partial(family.stage_inputs, rope=ropes[rotary], window=window)
        for stage, inputs in run(copy.deepcopy(layer).float(), hidden):
            at = recipe.at(stage.name)
            if at.basis != "klt" or at.w_bits == 16:
                continue
            moment = InputStatistics.gather(inputs, f"block {index} {stage.name}").moment
            most = min(_MOST * at.k, len(moment))
            basis = klt_basis(moment, most, seed=recipe.seed)
            matrix = StageWeights.of(layer, stage.linears).matrix.float()
            branch = Branch(sum(matrix.shape), ((moment @ basis) * basis).sum(0).cpu())
            branch.weight = float(matrix.square().mean())
            yield (index, stage.name), branch


@torch.inference_mode(False)
@torch.enable_grad()
def _add_gradients(model: nn.Module, family: Family, branches: dict[Place, Branch], tokens: Tensor, seed: int) -> None:
    """Add Σ ‖∂L/∂y‖² over tokens to every branch: L the loss at labels that the model draws."""
    generator = torch.Generator(tokens.device).manual_seed(seed)
    embedding: Any = model.get_submodule(family.decoder).get_submodule(family.embedding)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    embedding.weight.requires_grad_(True)  # so that gradients flow at all; its own is thrown away
    with _watched(model, family, branches):
        for sample in tokens.clone():  # one at a time: a model's activations are large
            logits = model(sample[None], use_cache=False).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            embedding.weight.grad = None
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(value)


@contextmanager
def _watched(model: nn.Module, family: Family, branches: dict[Place, Branch]) -> Iterator[None]:
    """Meanwhile the gradients of linears' outputs add up in their branches."""
    layers = list(model.get_submodule(family.decoder).get_submodule(family.layers).children())
    hooks = []
    for (index, name), branch in branches.items():

        def at_output(_module: nn.Module, _inputs: Any, y: Tensor, branch: Branch = branch) -> None:
            def add(gradient: Tensor) -> None:
                branch.gradients += float(gradient.double().square().sum())

            y.register_hook(add)

        stage = next(stage for stage in family.stages if stage.name == name)
        hooks += [layers[index].get_submodule(path).register_forward_hook(at_output) for path in stage.linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
