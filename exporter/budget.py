"""How many low frequencies each output channel keeps (Eq. 12 and 14, Algorithm 1, Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def importance(weight: Tensor, act_mean: Tensor, metric: str) -> Tensor:
    """One score an output channel. weight Ŵ [N, M], act_mean = mean over tokens of x̂ [N]; result [M]."""
    if metric == "act":  # Eq. 12, read as the dot product |x̄ · ŵ_j|
        return (act_mean @ weight).abs()
    if metric == "entropy":  # Algorithm 1: Shannon entropy of the channel's magnitude distribution, nats
        p = weight.abs() / weight.abs().sum(0).clamp(min=1e-12)
        return -(p * p.clamp(min=1e-12).log()).sum(0)
    if metric == "abs_mean":
        return weight.abs().mean(0)
    if metric == "abs_max":
        return weight.abs().amax(0)
    if metric == "l2":
        return weight.norm(dim=0)
    if metric == "uniform":
        return torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
    raise ValueError(f"unknown budget metric {metric}")


def frequencies_per_channel(score: Tensor, k: int, alpha: float) -> Tensor:
    """k_j = clip(⌊ρ_j · k · M⌋, 0, k), ρ = softmax(α · z(score)): int64 [M] from scores [M].

    The paper spends C_in over a whole layer, which contradicts its "16 per channel"; here the total is at most k · M.
    """
    z = (score - score.mean()) / score.std(correction=0).clamp(min=1e-12)
    rho = torch.softmax(alpha * z.double(), 0)
    # A hair above: ⌊k · M · 1/M⌋ must be k, whatever the rounding of the softmax.
    return torch.floor(rho * k * len(score) + 1e-9).clamp(0, k).long()


def truncate(coef: Tensor, frequencies: Tensor) -> Tensor:
    """Zero the coefficients above each channel's k_j. coef of a DFT basis [2k − 1, M], frequencies [M]."""
    rows = torch.arange(coef.shape[0], device=coef.device)[:, None]
    return torch.where(rows < 2 * frequencies[None, :] - 1, coef, torch.zeros_like(coef))
