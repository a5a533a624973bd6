"""Smoothing: per-channel factors λ that move outliers from activations into weights (Eq. before 12)."""

from __future__ import annotations

import torch
from torch import Tensor


def smoothing_factors(act_size: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """λ_i = size(X_i)^α / max|W_i|^(1 − α), geometric mean 1. Inputs and result [N], float32.

    The size of a channel is max|X_i| in the paper. Its root mean square ignores the few tokens, a text's first above
    all, whose values are hundreds of times the others'.

    Channels that are dead on either side keep λ = 1: their share of the product is nothing.
    """
    dead = (act_size <= 1e-8) | (weight_max <= 1e-8)
    log = alpha * act_size.clamp(min=1e-8).log() - (1 - alpha) * weight_max.clamp(min=1e-8).log()
    log = torch.where(dead, torch.zeros_like(log), log)
    alive = (~dead).sum().clamp(min=1)
    log = torch.where(dead, torch.zeros_like(log), log - log.sum() / alive)
    # Folded factors end up in float16 scales: beyond 2^±8 their precision would suffer more than activations gain.
    return log.clamp(-5.5, 5.5).exp()


def share_over_heads(values: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Maximum over the query heads that read one value head: [heads · d] -> [kv_heads · d].

    o_proj's input channels repeat each value channel once per query head of its group, so they share one λ.
    """
    d = values.shape[0] // num_heads
    return values.view(num_kv_heads, num_heads // num_kv_heads, d).amax(1).reshape(-1)


def spread_over_heads(factors: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """The inverse of sharing: [kv_heads · d] -> [heads · d], each value channel's factor for every query head."""
    d = factors.shape[0] // num_kv_heads
    return factors.view(num_kv_heads, 1, d).expand(-1, num_heads // num_kv_heads, -1).reshape(-1)
