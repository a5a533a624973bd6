"""Statistics of the inputs that linears see, gathered block by block: only one block's activations are in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.families import Family, rotary_tables, text_config
from specquant.exporter.kv import block_hadamard

_CHUNK_TOKENS = 4096  # tokens that go through a block at once


@dataclass
class InputStatistics:
    """Of one stage's input X [T, N]: second moment XᵀX / T, largest magnitude and mean a channel, a sample of rows."""

    moment: Tensor  # float32 [N, N]
    largest: Tensor  # float32 [N]
    mean: Tensor  # float32 [N]
    sample: Tensor  # float32 [S, N]

    @classmethod
    def gather(cls, inputs: Iterable[Tensor], where: str, sample_rows: int = 2048) -> InputStatistics:
        """Raises SpecQuantError naming `where` if the activations hold NaN or infinity."""
        chunks = [x.reshape(-1, x.shape[-1]) for x in inputs]
        tokens, n = sum(len(c) for c in chunks), chunks[0].shape[1]
        moment = torch.zeros(n, n, device=chunks[0].device)
        mean, largest = torch.zeros_like(moment[0]), torch.zeros_like(moment[0])
        for c in chunks:
            moment.addmm_(c.T, c)
            mean += c.sum(0)
            largest = torch.maximum(largest, c.abs().amax(0))
        if not torch.isfinite(mean).all() or not torch.isfinite(moment.diagonal()).all():
            raise SpecQuantError(
                f"activations going into {where} hold NaN or infinity; the model or the calibration text is damaged"
            )
        step = max(1, tokens // sample_rows)
        sample = torch.cat([c[::step] for c in chunks])[:sample_rows]
        return cls(moment / tokens, largest, mean / tokens, sample)

    def channel_size(self, by: str) -> Tensor:
        """How large each input channel is, [N]: its largest magnitude (`max`), or its root mean square (`rms`)."""
        return self.largest if by == "max" else self.moment.diagonal().clamp(min=0).sqrt()

    def scaled(self, factors: Tensor) -> InputStatistics:
        """The statistics of x̂ = x / factors."""
        f = 1 / factors
        return InputStatistics(self.moment * f * f[:, None], self.largest * f, self.mean * f, self.sample * f)

    def rotated(self, block: int) -> InputStatistics:
        """The statistics of x̂H; the largest magnitudes are those of the sample."""
        sample = block_hadamard(self.sample, block)
        moment = block_hadamard(block_hadamard(self.moment, block).T, block)
        return InputStatistics(moment, sample.abs().amax(0), block_hadamard(self.mean, block), sample)


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
