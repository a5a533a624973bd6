"""Statistics of the inputs that linears see, gathered block by block: only one block's activations are in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.families import Family, Stage, rotary_tables, text_config
from specquant.exporter.kv import block_hadamard

_CHUNK_TOKENS = 4096  # tokens that go through a block at once
_GRAM_COLUMNS = 288  # of a second moment, made by one product


@dataclass
class InputStatistics:
    """Of one stage's input X [T, N]: second moment XᵀX / T, largest magnitude and mean a channel, a sample of rows.

    drift: Xᵀ(X̃ − X) / T, with X̃ the float model's input of the same tokens; None where that is not followed.
    """

    moment: Tensor  # float32 [N, N]
    largest: Tensor  # float32 [N]
    mean: Tensor  # float32 [N]
    sample: Tensor  # float32 [S, N]
    drift: Tensor | None = None  # float32 [N, N]

    @classmethod
    def gather(
        cls, inputs: Iterable[Tensor], where: str, sample_rows: int = 2048, exact: Iterable[Tensor] | None = None
    ) -> InputStatistics:
        """exact: the float model's inputs of the same tokens. Raises SpecQuantError naming `where` if the activations
        hold NaN or infinity."""
        chunks = [x.reshape(-1, x.shape[-1]) for x in inputs]
        tokens, n = sum(len(c) for c in chunks), chunks[0].shape[1]
        moment = torch.zeros(n, n, device=chunks[0].device)
        mean, largest = torch.zeros_like(moment[0]), torch.zeros_like(moment[0])
        for c in chunks:
            _add_gram(moment, c)
            mean += c.sum(0)
            largest = torch.maximum(largest, c.abs().amax(0))
        moment = moment.triu() + moment.triu(1).T
        drift = None
        if exact is not None:
            drift = torch.zeros_like(moment)
            for c, x in zip(chunks, exact, strict=True):
                drift.addmm_(c.T, x.reshape(c.shape) - c)
        if not torch.isfinite(mean).all() or not torch.isfinite(moment.diagonal()).all():
            raise SpecQuantError(
                f"activations going into {where} hold NaN or infinity; the model or the calibration text is damaged"
            )
        step = max(1, tokens // sample_rows)
        sample = torch.cat([c[::step] for c in chunks])[:sample_rows]
        return cls(moment / tokens, largest, mean / tokens, sample, None if drift is None else drift / tokens)

    def channel_size(self, by: str) -> Tensor:
        """How large each input channel is, [N]: its largest magnitude (`max`), or its root mean square (`rms`)."""
        return self.largest if by == "max" else self.moment.diagonal().clamp(min=0).sqrt()

    def scaled(self, factors: Tensor) -> InputStatistics:
        """The statistics of x̂ = x / factors."""
        f = 1 / factors
        drift = None if self.drift is None else self.drift * f * f[:, None]
        return InputStatistics(self.moment * f * f[:, None], self.largest * f, self.mean * f, self.sample * f, drift)

    def rotated(self, block: int) -> InputStatistics:
        """The statistics of x̂H; the largest magnitudes are those of the sample."""
        sample = block_hadamard(self.sample, block)
        moment = _rotated(self.moment, block)
        drift = None if self.drift is None else _rotated(self.drift, block)
        return InputStatistics(moment, sample.abs().amax(0), block_hadamard(self.mean, block), sample, drift)


def _add_gram(moment: Tensor, x: Tensor) -> None:
    """Add XᵀX of x [T, N] to moment's upper triangle; below it the half that symmetry gives is mostly left out."""
    n = len(moment)
    for start in range(0, n, _GRAM_COLUMNS):
        moment[start : start + _GRAM_COLUMNS, start:].addmm_(x[:, start : start + _GRAM_COLUMNS].T, x[:, start:])


def _rotated(matrix: Tensor, block: int) -> Tensor:
    """Hᵀ · matrix · H."""
    return block_hadamard(block_hadamard(matrix, block).T, block).T


def first_block_inputs(model: nn.Module, family: Family, tokens: Tensor) -> tuple[list[Tensor], list[Any]]:
    """Hidden states entering the first block, in chunks, and (cos, sin) of every rotary table.

    tokens int64 [samples, length].
    """
    base, text = model.get_submodule(family.decoder), text_config(model.config)
    per_chunk = max(1, _CHUNK_TOKENS // tokens.shape[1])
    table: Any = base.get_submodule(family.embedding).weight
    hidden = [table[t].float() * family.embedding_scale(text) for t in tokens.split(per_chunk)]
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return hidden, rotary_tables(base, family, text, hidden[0], positions)


def float_copy(layer: nn.Module, family: Family, attention: str) -> nn.Module:
    """A block as it is before quantisation, with attention as transformers names it and no 4-bit cache."""
    whole = copy.deepcopy(layer)
    module: Any = whole.get_submodule(family.attention)
    module.config._attn_implementation = attention
    return whole


def in_step(
    run: Callable[..., Iterator[tuple[Stage, list[Tensor]]]],
    quantised: tuple[nn.Module, list[Tensor]],
    whole: tuple[nn.Module, list[Tensor]] | None,
) -> Iterator[tuple[Stage, list[Tensor], list[Tensor] | None]]:
    """Stages of a block with their inputs, and with the inputs of the same stages in its float copy, if there is one.

    quantised, whole: (block, hidden states), as `Family.stage_inputs` takes them and leaves them.
    """
    beside = None if whole is None else run(*whole)
    for stage, inputs in run(*quantised):
        yield stage, inputs, None if beside is None else next(beside)[1]
    if beside is not None:
        next(beside, None)  # to its end: only then `whole` holds the block's outputs
