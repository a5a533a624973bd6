"""Rounding a residual to INT4: scales by clipped MSE, round-to-nearest or GPTQ (Frantar et al. 2022), and descent."""

from __future__ import annotations

import torch
from torch import Tensor

QMIN, QMAX = -8, 7


def mse_scales(weight: Tensor, group_size: int, importance: Tensor | None = None, steps: int = 24) -> Tensor:
    """Scale per (group, output channel) that minimises the (weighted) squared rounding error over clip ratios.

    weight [N, M]; importance [N] or None; result [G, M] in weight's dtype, exactly representable in float16, > 0.
    """
    n, m = weight.shape
    groups = weight.view(n // group_size if group_size else 1, -1, m)
    weighting = None if importance is None else importance.view(groups.shape[0], -1, 1)
    top = groups.abs().amax(1)
    best_scale = as_float16(top / QMAX)
    best_error = torch.full_like(top, torch.inf)
    for step in range(steps):
        ratio = 1.05 - 0.6 * step / (steps - 1)
        scale = as_float16(top * ratio / QMAX)
        error = (groups - torch.clamp(torch.round(groups / scale[:, None]), QMIN, QMAX) * scale[:, None]).square_()
        if weighting is not None:
            error *= weighting
        total = error.sum(1)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def as_float16(scale: Tensor) -> Tensor:
    """Round to what float16 stores, kept normal and positive so that dividing by it is always safe."""
    return scale.clamp(6.2e-5, 65000).half().to(scale.dtype)


def expand(scales: Tensor, n: int) -> Tensor:
    """[G, M] -> [N, M]: each feature's scale."""
    return scales.repeat_interleave(n // scales.shape[0], 0)


def rtn(weight: Tensor, scales: Tensor) -> Tensor:
    """Round to nearest: weight [N, M], scales [G, M] -> q int8 [N, M] in −8…7."""
    return torch.clamp(torch.round(weight / expand(scales, weight.shape[0])), QMIN, QMAX).to(torch.int8)


def gptq(weight: Tensor, hessian: Tensor, scales: Tensor, damping: float = 0.01, block: int = 128) -> Tensor:
    """Round feature by feature, spreading each rounding error over the features still to come.

    Minimises ‖X(W − Ŵ)‖² with hessian = XᵀX [N, N] (any positive scale). Features are visited by falling diagonal
    (act-order), while scales [G, M] belong to features in their own order, so that nothing is permuted at run time.
    weight [N, M] -> q int8 [N, M] in −8…7.
    """
    n = len(weight)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _error_spread(hessian[order][:, order].double(), damping).to(weight.dtype)
    w, s = weight[order].clone(), expand(scales, n)[order]
    q = torch.empty_like(w)
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            q[i] = torch.clamp(torch.round(w[i] / s[i]), QMIN, QMAX)
            errors[i - start] = (w[i] - q[i] * s[i]) / upper[i, i]
            w[i:stop] -= upper[i, i:stop, None] * errors[i - start]
        w[stop:] -= upper[start:stop, stop:].T @ errors
    out = torch.empty_like(q)
    out[order] = q
    return out.to(torch.int8)


def descend(
    weight: Tensor, hessian: Tensor, q: Tensor, scales: Tensor, damping: float = 0.01, sweeps: int = 2, block: int = 32
) -> Tensor:
    """Integers that no change of a single one improves, or `sweeps` steps on the way there from the q given.

    A sweep visits every feature, in GPTQ's order, and gives each channel's integer there the value that is best while
    its others stay: ‖X(W − Ŵ)‖² falls or stays at every step. GPTQ never returns to a feature; this does.
    weight [N, M], hessian [N, N], damped as for `gptq`, q int8 [N, M], scales [G, M] -> int8 [N, M].
    """
    h, s, levels = _damped(hessian, damping), expand(scales, len(weight)), q.to(weight.dtype)
    rest = weight - levels * s
    pull = 1 / (h.diagonal()[:, None] * s)  # from a gradient to the change of an integer that would end it
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    for rows in order.split(block) * sweeps:
        gradient, among = h[rows] @ rest, h[rows][:, rows]
        for at, i in enumerate(rows.tolist()):
            best = torch.clamp(torch.round(levels[i] + gradient[at] * pull[i]), QMIN, QMAX)
            change = (best - levels[i]) * s[i]
            levels[i] = best
            rest[i] -= change
            gradient[at + 1 :] -= among[at + 1 :, at, None] * change
    return levels.to(torch.int8)


def refit_scales(weight: Tensor, hessian: Tensor, q: Tensor, scales: Tensor, damping: float = 0.01) -> Tensor:
    """The scales that minimise ‖X(W − Ŵ)‖² for integers already chosen: least squares over an output channel's groups.

    With Q_m [N, G] holding the channel's integers, each in its group's column, s_m solves (Q_mᵀHQ_m) s = Q_mᵀHw_m.
    weight [N, M], hessian [N, N], damped as for `gptq`, q int8 [N, M], scales [G, M] -> [G, M] as float16 stores them.
    A channel whose solution would turn a scale upside down keeps the ones it has.
    """
    n, m = weight.shape
    groups = len(scales)
    h, levels = _damped(hessian, damping), q.to(weight.dtype)
    target = (levels * (h @ weight)).view(groups, -1, m).sum(1).double()
    system = torch.empty(groups, groups, m, dtype=torch.float64, device=h.device)
    for g, rows in enumerate(torch.arange(n, device=h.device).chunk(groups)):
        system[:, g] = (levels * (h[:, rows] @ levels[rows])).view(groups, -1, m).sum(1)
    system = system.permute(2, 0, 1)
    # A group of zeros has no scale to find; a hair on the diagonal leaves the others what they are.
    ridge = 1e-9 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    system = system + ridge[:, None, None] * torch.eye(groups, dtype=system.dtype, device=h.device)
    solved = torch.linalg.solve(system, target.T)
    valid = (solved > 0).all(1) & solved.isfinite().all(1)
    return as_float16(torch.where(valid, solved.T.to(scales.dtype), scales))


def follow(weight: Tensor, hessian: Tensor, drift: Tensor, share: float, damping: float = 0.1) -> Tensor:
    """The weights that, on inputs X of a model quantised up to here, come nearer to what W made of the float model's X̃.

    ‖XW' − X̃W‖² is smallest at W' = W + H⁻¹ Xᵀ(X̃ − X) W (the asymmetric calibration of GPTAQ, Li et al. 2025, all of
    it before rounding instead of feature by feature); `share` in [0, 1] of that step is taken, since it fits the sample
    too. weight [N, M], hessian = XᵀX and drift = Xᵀ(X̃ − X) [N, N], by the same scale -> [N, M].
    """
    lower = _cholesky(hessian.double(), damping)
    step = torch.cholesky_solve(drift.double() @ weight.double(), lower)
    return weight + share * step.to(weight.dtype)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    mean = hessian.diagonal().mean().clamp(min=1e-30)
    return hessian + damping * mean * torch.eye(len(hessian), device=hessian.device, dtype=hessian.dtype)


def _error_spread(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse: row i holds how feature i's error moves to the features after it."""
    return torch.linalg.cholesky(torch.cholesky_inverse(_cholesky(hessian, damping)), upper=True)


def _cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Lower factor. A hessian summed in float32 may miss being positive definite by more than the damping: then ten
    times as much."""
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping))
        if not failed:
            return lower
        damping *= 10
