"""Scales of weights in two levels (docs/ops.md): one for each output channel, whole numbers of it for its groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from specquant.custom_ops.packing import MOST
from specquant.exporter.gptq import QMAX, QMIN, damped


class Scales(NamedTuple):
    """scales [M], as float16 stores them, > 0; group_scales [G, M], whole numbers from 1 to 16, all 1 if G is 1."""

    scales: Tensor
    group_scales: Tensor

    @property
    def product(self) -> Tensor:
        """[G, M]: what a level of each group is worth; exact in float32."""
        return self.scales * self.group_scales


def as_float16(scale: Tensor) -> Tensor:
    """Round to what float16 stores, positive and large enough that dividing by it is always safe.

    A sixteenth of a group's scale may lie below float16's normal numbers, where it has still six bits.
    """
    return scale.clamp(4e-6, 65000).half().to(scale.dtype)


def mse_scales(weight: Tensor, group_size: int, importance: Tensor | None = None, tries: int = 24) -> Scales:
    """Scales that minimise the (weighted) squared error of rounding to nearest.

    First each group's best of `tries` shares of its range; then, for half as many scales of the output channel, the
    better of the two whole numbers beside that in each group, and of these scales the best one.
    weight [N, M]; importance [N] or None; the result is in weight's dtype.
    """
    n, m = weight.shape
    groups = weight.view(n // group_size if group_size else 1, -1, m)
    weighting = None if importance is None else importance.view(groups.shape[0], -1, 1)

    def error(scale: Tensor) -> Tensor:
        """Of every group [G, M] with these scales."""
        rounded = torch.clamp(torch.round(groups / scale[:, None]), QMIN, QMAX) * scale[:, None]
        squares = rounded.sub_(groups).square_()
        return (squares if weighting is None else squares.mul_(weighting)).sum(1)

    top = groups.abs().amax(1)
    free, least = as_float16(top / QMAX), torch.full_like(top, torch.inf)
    for share in torch.linspace(1.05, 0.45, tries).tolist():
        scale = as_float16(top * share / QMAX)
        total = error(scale)
        free, least = torch.where(total < least, scale, free), torch.minimum(total, least)
    if len(groups) == 1:
        return Scales(free[0], torch.ones_like(free))
    best, least = Scales(free[0], torch.ones_like(free)), torch.full_like(free[0], torch.inf)
    for scales in _of_outputs(free, tries // 2):
        below, above = (torch.clamp(torch.floor(free / scales) + more, 1, MOST) for more in (0, 1))
        errors = [error(scales * group_scales) for group_scales in (below, above)]
        group_scales = torch.where(errors[1] < errors[0], above, below)
        total = torch.minimum(*errors).sum(0)
        best, least = _better(best, least, Scales(scales, group_scales), total)
    return best


def refit_scales(weight: Tensor, hessian: Tensor, q: Tensor, old: Scales, damping: float = 0.01) -> Scales:
    """Scales that lower ‖X(W − Ŵ)‖² for integers already chosen: least squares over an output channel's groups.

    With Q_m [N, G] holding the channel's integers, each in its group's column, scales that need not be whole numbers of
    one solve (Q_mᵀHQ_m) s = Q_mᵀHw_m. For several scales of the channel, s is rounded to whole numbers c of it, and the
    scale becomes the best one for these, cᵀQ_mᵀHw_m / cᵀQ_mᵀHQ_m c.
    weight [N, M], hessian [N, N], damped as for `gptq`, q int8 [N, M]. A channel keeps its old scales where none of
    these is better, and starts from them where s would turn a scale upside down.
    """
    groups = len(old.group_scales)
    system, target = _normal_equations(weight, hessian, q, groups, damping)
    solved = torch.linalg.solve(system, target)
    valid = ((solved > 0) & solved.isfinite()).all(1)
    free = torch.where(valid, solved.T, old.product.to(solved.dtype))
    if groups == 1:
        return Scales(as_float16(free[0].to(weight.dtype)), old.group_scales)

    def terms(group_scales: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients of scale² and −2 · scale in the error of every channel, [M] each."""
        c = group_scales.T
        return (c * (system @ c[..., None])[..., 0]).sum(1), (c * target).sum(1)

    best = Scales(*(part.to(solved.dtype) for part in old))
    square, pull = terms(best.group_scales)
    least = best.scales * (best.scales * square - 2 * pull)
    for scales in _of_outputs(free, 15):
        group_scales = torch.clamp(torch.round(free / scales), 1, MOST)
        square, pull = terms(group_scales)
        scales = as_float16(pull / square)
        best, least = _better(best, least, Scales(scales, group_scales), scales * (scales * square - 2 * pull))
    return Scales(*(part.to(weight.dtype) for part in best))


def _of_outputs(free: Tensor, count: int) -> Iterator[Tensor]:
    """Scales of outputs [M] to try for groups' scales [G, M]: those whose 13- to 17-fold is the largest group's."""
    largest = free.amax(0) / MOST
    for factor in torch.linspace(0.92, 1.2, count).tolist():
        yield as_float16(largest * factor)


def _better(best: Scales, least: Tensor, found: Scales, error: Tensor) -> tuple[Scales, Tensor]:
    """Channel by channel the scales whose error [M] is the smaller one, and that error."""
    better = error < least
    return Scales(*(torch.where(better, a, b) for a, b in zip(found, best, strict=True))), torch.minimum(error, least)


def _normal_equations(weight: Tensor, hessian: Tensor, q: Tensor, groups: int, damping: float) -> tuple[Tensor, Tensor]:
    """QᵀHQ [M, G, G] and QᵀHw [M, G] of every output channel, float64."""
    n, m = weight.shape
    h, levels = damped(hessian, damping), q.to(weight.dtype)
    target = (levels * (h @ weight)).view(groups, -1, m).sum(1).double()
    system = torch.empty(groups, groups, m, dtype=torch.float64, device=h.device)
    for g, rows in enumerate(torch.arange(n, device=h.device).chunk(groups)):
        system[:, g] = (levels * (h[:, rows] @ levels[rows])).view(groups, -1, m).sum(1)
    system = system.permute(2, 0, 1).contiguous()
    # A group of zeros has no scale to find; a hair on the diagonal leaves the others what they are.
    ridge = 1e-9 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    system += ridge[:, None, None] * torch.eye(groups, dtype=system.dtype, device=h.device)
    return system, target.T
