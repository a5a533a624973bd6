"""The two bases against NumPy's FFT and a full eigendecomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specquant.exporter.basis import dft_basis, klt_basis


@pytest.mark.parametrize(("n", "k"), [(8, 1), (30, 4), (31, 16), (64, 32)])
def test_dft_keeps_the_lowest_frequencies(rng: np.random.Generator, n: int, k: int) -> None:
    signal = rng.standard_normal((n, 5))
    basis = dft_basis(n, k).numpy()
    assert basis.shape == (n, 2 * k - 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2 * k - 1), atol=1e-12)
    spectrum = np.fft.rfft(signal, axis=0)
    spectrum[k:] = 0
    np.testing.assert_allclose(basis @ (basis.T @ signal), np.fft.irfft(spectrum, n, axis=0), atol=1e-12)


def test_dft_columns_are_ordered_by_frequency() -> None:
    """A session that uses fewer columns uses a smaller basis."""
    torch.testing.assert_close(dft_basis(40, 9)[:, :7], dft_basis(40, 4), rtol=0, atol=0)


def second_moment(rng: np.random.Generator, tokens: int, n: int) -> torch.Tensor:
    """Of channels that are correlated and of very unequal energy, as activations are."""
    x = rng.standard_normal((tokens, n)) * np.exp(-0.2 * np.arange(n)) @ rng.standard_normal((n, n))
    return torch.from_numpy((x.T @ x / tokens).astype(np.float32))


@pytest.mark.parametrize(("n", "r"), [(50, 1), (50, 7), (33, 33)])
def test_klt_captures_as_much_as_the_leading_eigenvectors(rng: np.random.Generator, n: int, r: int) -> None:
    moment = second_moment(rng, 200, n)
    basis = klt_basis(moment, r)
    assert basis.shape == (n, r)
    torch.testing.assert_close(basis.T @ basis, torch.eye(r), rtol=0, atol=1e-5)
    energy = (basis.T.double() @ moment.double() @ basis.double()).diagonal()
    best = torch.linalg.eigvalsh(moment.double()).flip(0)[:r]
    assert energy.sum() >= (1 - 1e-5) * best.sum()
    assert (energy.diff() <= 1e-5 * energy[0]).all()  # leading first
    torch.testing.assert_close(basis, klt_basis(moment, r), rtol=0, atol=0)


def test_klt_of_fewer_tokens_than_columns(rng: np.random.Generator) -> None:
    basis = klt_basis(second_moment(rng, 3, 40), 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), rtol=0, atol=1e-5)
