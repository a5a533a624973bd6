"""Quantising the linears that share one input: smoothing given, then basis, residual, scales and rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter import gptq
from specquant.exporter.basis import dft_basis, klt_basis
from specquant.exporter.budget import frequencies_per_channel, importance, truncate
from specquant.exporter.calibrate import InputStatistics
from specquant.exporter.decoder import FloatLinear, QuantLinear
from specquant.exporter.families import weight_of
from specquant.exporter.kv import block_hadamard
from specquant.exporter.recipe import Recipe
from specquant.exporter.scales import Scales, as_float16, mse_scales, refit_scales
from specquant.exporter.simulate import SimLinear, fake_quantize, sim_linears


@dataclass
class StageWeights:
    """matrix float32 [N, M] (in × out), the parts concatenated along M; bias float32 [M] or None."""

    parts: dict[str, int]
    matrix: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, paths: Iterable[str]) -> StageWeights:
        weights = {path: weight_of(layer, path) for path in paths}
        biases = {path: getattr(layer.get_submodule(path), "bias", None) for path in weights}
        bias = None
        if any(b is not None for b in biases.values()):
            bias = torch.cat(
                [w.new_zeros(len(w)) if (b := biases[p]) is None else b.detach().to(w) for p, w in weights.items()]
            )
        matrix = torch.cat(list(weights.values())).T.contiguous()
        return cls({path: len(w) for path, w in weights.items()}, matrix, bias)

    def scaled(self, factors: Tensor) -> StageWeights:
        """Ŵ = diag(λ) W."""
        return StageWeights(self.parts, self.matrix * factors[:, None], self.bias)

    def rotated(self, block: int) -> StageWeights:
        """HŴ, which meets x̂H."""
        return StageWeights(self.parts, block_hadamard(self.matrix.T, block).T.contiguous(), self.bias)


@dataclass
class FloatStage:
    """Linears that stay in floating point."""

    name: str
    weights: StageWeights

    @property
    def parts(self) -> dict[str, int]:
        return self.weights.parts

    def scale_last_outputs(self, factors: Tensor) -> None:
        """Multiply the last output channels, one for each of `factors`, and their biases."""
        self.weights.matrix[:, -len(factors) :] *= factors
        if self.weights.bias is not None:
            self.weights.bias[-len(factors) :] *= factors

    def to_linear(self) -> FloatLinear:
        w = self.weights
        return FloatLinear(self.name, w.parts, w.matrix.cpu().numpy(), None if w.bias is None else w.bias.cpu().numpy())


@dataclass
class QuantStage:
    """A quantised stage; every tensor already holds a value that its storage type can (float16 scales and branch)."""

    name: str
    weights: StageWeights  # smoothed, rotated, and led towards the float model's outputs
    q: Tensor  # int8 [N, M]
    scales: Scales
    basis: Tensor | None  # [N, r]
    coef: Tensor | None  # [r, M]
    recipe: Recipe
    error: float
    alpha: float | None = None
    hadamard: int = 0  # block of the transform that the input passes through
    clip: float = 1.0  # share of the range of a group of activations that the levels span

    @property
    def parts(self) -> dict[str, int]:
        return self.weights.parts

    @classmethod
    def build(
        cls,
        name: str,
        weights: StageWeights,
        stats: InputStatistics,
        recipe: Recipe,
        quick: bool = False,
    ) -> QuantStage:
        """Weights and statistics are those of x̂ and Ŵ. quick: round to nearest in fewer steps, for a search that only
        compares errors."""
        block = recipe.hadamard_block(len(weights.matrix))
        if block:
            weights, stats = weights.rotated(block), stats.rotated(block)
        if not torch.isfinite(stats.moment).all():
            raise SpecQuantError(f"activations going into {name} are too large for float32; the model is damaged")
        if stats.drift is not None:
            matrix = gptq.follow(weights.matrix, stats.moment, stats.drift, recipe.asymmetry)
            weights = replace(weights, matrix=matrix)
        w = weights.matrix
        basis, coef = _branch(weights, stats, recipe, quick)
        residual, moment = w, stats.moment
        if basis is not None and coef is not None:
            residual = w - basis @ coef
            if recipe.subtract:
                moment = _without(basis, moment)
        importance = moment.diagonal().clamp(min=0)
        scales = mse_scales(residual, recipe.group_size, importance, tries=6 if quick else 24)
        if quick or recipe.rounding == "rtn":
            q = gptq.rtn(residual, scales.product)
        else:
            q, scales = _round(residual, moment, scales, recipe)
        stage = cls(name, weights, q, scales, basis, coef, recipe, error=0.0, hadamard=block)
        clips = recipe.clip_grid[:1] if quick or recipe.a_bits == 16 else recipe.clip_grid
        stage.error, stage.clip = min(zip(stage._output_errors(stats.sample, clips), clips, strict=True))
        return stage

    def _output_errors(self, x: Tensor, clips: Sequence[float]) -> list[float]:
        """‖y − ŷ‖² / ‖y‖² over a sample of inputs x̂H [S, N], for each share of the range."""
        bits, group = self.recipe.a_bits, self.recipe.activation_group
        rest = x @ self.weights.matrix  # what the residual should give
        size, u = rest.square().sum().clamp(min=1e-30), x
        if self.basis is not None and self.coef is not None:
            low = x @ self.basis
            rest = rest - low @ self.coef
            if self.recipe.subtract:
                u = x - low @ self.basis.T
        residual = self.q * gptq.expand(self.scales.product, len(self.q))
        return [float((rest - fake_quantize(u, bits, group, clip) @ residual).square().sum() / size) for clip in clips]

    def scale_last_outputs(self, factors: Tensor) -> None:
        """Multiply the last output channels: exact for the integers, one rounding for the float16 values."""
        columns, scales = slice(-len(factors), None), self.scales.scales
        scales[columns] = as_float16(scales[columns] * factors)
        if self.coef is not None:
            self.coef[:, columns] = _float16(self.coef[:, columns] * factors, f"{self.name} coefficients")
        if self.weights.bias is not None:
            self.weights.bias[columns] *= factors

    def modules(self) -> dict[str, SimLinear]:
        """The simulation of every part."""
        return {k: m.to(self.q.device) for k, m in sim_linears(self.to_linear()).items()}

    def to_linear(self) -> QuantLinear:
        r, w = self.recipe, self.weights
        return QuantLinear(
            name=self.name,
            parts=w.parts,
            q=self.q.cpu().numpy(),
            group_scales=self.scales.group_scales.to(torch.int8).cpu().numpy(),
            scales=self.scales.scales.half().cpu().numpy(),
            group_size=r.group_size,
            act_bits=r.a_bits,
            act_group=r.activation_group,
            basis=None if self.basis is None else self.basis.half().cpu().numpy(),
            coef=None if self.coef is None else self.coef.half().cpu().numpy(),
            subtract=r.subtract and self.basis is not None,
            bias=None if w.bias is None else w.bias.cpu().numpy(),
            hadamard=self.hadamard,
            act_clip=self.clip,
            alpha=self.alpha,
            error=self.error,
        )


def _round(residual: Tensor, moment: Tensor, scales: Scales, recipe: Recipe) -> tuple[Tensor, Scales]:
    """q int8 [N, M] from GPTQ and descents, and scales fitted to it where a branch has taken out of x the directions in
    which few tokens dominate."""
    q = gptq.gptq(residual, moment, scales.product, recipe.damping)
    refits = recipe.subtract and recipe.basis == "klt"
    if refits:
        scales = refit_scales(residual, moment, q, scales, recipe.damping)
    for _ in range(recipe.descents):
        q = gptq.descend(residual, moment, q, scales.product, recipe.damping)
        if refits:
            scales = refit_scales(residual, moment, q, scales, recipe.damping)
    if recipe.descents:  # the last word is the integers': they make up for scales that are whole numbers
        q = gptq.descend(residual, moment, q, scales.product, recipe.damping)
    return q, scales


def _branch(
    weights: StageWeights, stats: InputStatistics, recipe: Recipe, quick: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Basis B [N, r] and coefficients C = BᵀŴ [r, M] (Eq. 13–16), both as float16 stores them."""
    w = weights.matrix
    if recipe.basis == "none":
        return None, None
    if recipe.basis == "klt":
        basis = klt_basis(stats.moment, recipe.k, iterations=4 if quick else 12, seed=recipe.seed)
        return (b := _float16(basis, "basis")), _float16(b.T @ w, "coefficients")
    basis = _float16(dft_basis(len(w), recipe.k).to(w), "basis")
    coef = basis.T @ w
    if recipe.budget != "uniform":
        score = importance(w, stats.mean, recipe.budget)
        coef = truncate(coef, frequencies_per_channel(score, recipe.k, recipe.budget_alpha))
    return basis, _float16(coef, "coefficients")


def _without(basis: Tensor, moment: Tensor) -> Tensor:
    """(I − BBᵀ) H (I − BBᵀ), the second moment of x̂ − x̂BBᵀ, by products of rank r.

    In float64: what the basis takes out can be a million times what stays.
    """
    b, h = basis.double(), moment.double()
    product = h @ b
    side = product @ b.T
    return (h - side - side.T + b @ (b.T @ product) @ b.T).to(moment.dtype)


def _float16(t: Tensor, what: str) -> Tensor:
    out = t.half().to(t.dtype)
    if not torch.isfinite(out).all():
        raise SpecQuantError(f"{what} of a spectral branch exceed float16; the weights are not those of a sane model")
    return out
