"""The two orthonormal bases B [N, r] of the low-frequency branch (Eq. 4–6 and the Karhunen–Loève transform)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dft_basis(n: int, k: int) -> Tensor:
    """Real form of the k lowest frequencies of a length-n DFT: float64 [n, 2k − 1], 2k − 1 ≤ n, orthonormal columns.

    Columns are 1/√n, then √(2/n)·cos and √(2/n)·sin of 2π·f·i/n for f = 1 … k − 1, so that a column index orders by
    frequency: conjugate symmetry (Eq. 5) makes the pair equal to keeping frequencies f and −f.
    """
    i = torch.arange(n, dtype=torch.float64)[:, None]
    f = torch.arange(1, k, dtype=torch.float64)[None, :]
    angle = 2 * math.pi * i * f / n
    basis = torch.empty(n, 2 * k - 1, dtype=torch.float64)
    basis[:, 0] = 1 / math.sqrt(n)
    basis[:, 1::2] = math.sqrt(2 / n) * torch.cos(angle)
    basis[:, 2::2] = math.sqrt(2 / n) * torch.sin(angle)
    return basis


def klt_basis(second_moment: Tensor, r: int, iterations: int = 8, seed: int = 0) -> Tensor:
    """The r leading eigenvectors of E[x̂ᵀx̂], leading first: [n, n] -> [n, r], orthonormal, in the input's dtype.

    Subspace iteration with oversampling and a Rayleigh–Ritz step: a full eigendecomposition of a 14336-wide
    matrix takes minutes, and only the energy that the subspace captures matters here.
    """
    n = second_moment.shape[0]
    width = min(n, 2 * r + 16)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, width, generator=generator, dtype=second_moment.dtype).to(second_moment.device)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(second_moment @ q)
    _, vectors = torch.linalg.eigh(q.T @ second_moment @ q)
    basis = (q @ vectors).flip(1)[:, :r]
    # An eigenvector's sign is arbitrary: fix it, so that runs of different LAPACKs stay comparable.
    sign = torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
    return basis * sign
