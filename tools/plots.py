"""Plots for docs/, from the numbers that tools/ablation.py and tools/spectrum.py have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Curve = Sequence[float]


def lines(
    path: Path, x: Sequence[float], curves: Mapping[str, Curve], xlabel: str, ylabel: str, log: bool = False
) -> None:
    """One panel, a line for each name; x doubles from tick to tick."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curves.items():
        axes.plot(x, values, marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log" if log else "linear")
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def energy(path: Path, ks: Sequence[int], panels: Mapping[str, Mapping[str, Curve]]) -> None:
    """A panel for each kind of layer: share of energy captured by each basis over K."""
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(3 * len(panels), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (kind, curves) in zip(all_axes[0], panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(ks, values, marker="o", label=name)
        axes.set(title=kind, xlabel="K", xscale="log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("share of energy")
    all_axes[0][-1].legend(fontsize=8)
    _save(figure, path)


def outliers(path: Path, panels: Mapping[str, tuple[Curve, Curve]]) -> None:
    """A panel for each kind of layer: largest magnitude of every input channel, sorted, before and after smoothing."""
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(3 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (title, (before, after)) in zip(all_axes[0], panels.items(), strict=True):
        for name, values in (("before", before), ("after smoothing", after)):
            axes.plot(sorted(values, reverse=True), label=name)
        axes.set(title=title, xlabel="channel, sorted", yscale="log")
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("largest |x|")
    all_axes[0][0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
