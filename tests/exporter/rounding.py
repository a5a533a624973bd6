"""Weights, second moments of inputs, and the error that rounding makes of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specquant.exporter.gptq import expand

N, M = 72, 13  # neither a multiple of the blocks that tests of GPTQ take


def correlated(rng: np.random.Generator, tokens: int = 300) -> Tensor:
    """The second moment of inputs whose channels are correlated, float64 [N, N]."""
    x = rng.standard_normal((tokens, N)) @ rng.standard_normal((N, N)) * np.exp(rng.standard_normal(N))
    return torch.from_numpy(x.T @ x / tokens)


def random_weight(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal((N, M)) * rng.uniform(0.01, 1, M))


def output_error(weight: Tensor, q: Tensor, scales: Tensor, hessian: Tensor) -> float:
    """‖X(W − Ŵ)‖² / T."""
    rest = weight - q.double() * expand(scales, len(weight))
    return float((rest * (hessian @ rest)).sum())
