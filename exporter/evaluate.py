"""A model in torch, unquantised or simulated: what `specquant eval` compares an artifact with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.families import family_of, longest_context, text_config
from specquant.exporter.sources import load_model, resolve

_LOGITS = 1 << 26  # numbers in a block of logits, 256 MB


@dataclass(frozen=True)
class FloatModel:
    """logits: ids int64 [T] -> float32 [T, vocab]; encode: text -> ids int64 [T], without special tokens.

    bits_per_weight: of the source's weight files, over the model's parameters (a tied head counts once).
    """

    name: str
    encode: Callable[[str], NDArray[np.int64]]
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    bits_per_weight: float


def float_model(source: str, revision: str | None = None) -> FloatModel:
    """Raises SpecQuantError if there is no such model or it cannot be read."""
    found = resolve(source, revision)
    model, tokenizer = load_model(found, "float32")

    @torch.inference_mode()
    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        return out

    def encode(text: str) -> NDArray[np.int64]:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    stored = sum(path.stat().st_size for path in found.weight_files())
    return FloatModel(found.name, encode, logits, 8 * stored / sum(p.numel() for p in model.parameters()))


@dataclass
class _Row:
    """Token ids [context, choice 1, choice 2, …], of every choice all but the last token, which predicts nothing.

    asked: which request each choice is.
    """

    context: list[int]
    choices: list[list[int]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.context) + sum(len(choice) - 1 for choice in self.choices)


@torch.inference_mode()
def continuation_scores(
    model: nn.Module,
    requests: Sequence[tuple[list[int], list[int]]],
    batch_tokens: int = 4096,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """The log-likelihood (nats) of every continuation, and whether greedy decoding would write it.

    requests: (context, continuation), token ids; a context that is too long loses its beginning. Requests with the same
    context share its computation. batch_tokens: padding included, in one pass through the transformers model, wherever
    its parameters are; a longer row is a batch of its own. progress is told how many requests are done.
    Raises SpecQuantError if a continuation is longer than the model's context.
    """
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None) or batch_tokens
    rows = _rows(requests, longest_context(config), min(batch_tokens, window))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch in _batches(rows, batch_tokens):
        nll, greedy = (values.cpu().numpy() for values in _token_scores(model, batch))
        done = 0
        for row in batch:
            for index, choice in zip(row.asked, row.choices, strict=True):
                part = slice(done, done + len(choice))
                scores[index] = (-float(nll[part].sum(dtype=np.float64)), bool(greedy[part].all()))
                done += len(choice)
        progress(sum(len(row.asked) for row in batch))
    return scores


def _rows(requests: Sequence[tuple[list[int], list[int]]], limit: int, longest: int) -> list[_Row]:
    """limit: the model's context. longest: tokens of a row with more than one choice; its mask knows no window."""
    open_rows: dict[tuple[int, ...], _Row] = {}
    rows = []
    for index, (context, choice) in enumerate(requests):
        fits = (context + choice)[-(limit + 1) :]  # as lm-eval's own models cut it
        context = fits[: len(fits) - len(choice)]
        if not context:
            raise SpecQuantError(f"an answer has {len(choice)} tokens and the model's context holds {limit}")
        row = open_rows.get(key := tuple(context))
        if row is None or len(row) + len(choice) - 1 > longest:
            row = open_rows[key] = _Row(context)
            rows.append(row)
        row.choices.append(choice)
        row.asked.append(index)
    return rows


def _batches(rows: list[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows of about the same length, the longest first; those of one choice apart: they need no mask."""
    for single in (True, False):
        batch: list[_Row] = []
        for row in sorted((row for row in rows if (len(row.choices) == 1) == single), key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def _token_scores(model: nn.Module, rows: list[_Row]) -> tuple[Tensor, Tensor]:
    """Of the tokens of all choices, one row after the other: -log p float32 [n], whether it is the likeliest [n]."""
    width = max(map(len, rows))
    ids, positions, parts = np.zeros((3, len(rows), width), np.int64)  # part 0: the context (and padding), i: choice i
    picked, targets = [], []
    for number, row in enumerate(rows):
        end = start = len(row.context)
        ids[number, :start], positions[number, :start] = row.context, np.arange(start)
        for part, choice in enumerate(row.choices, 1):
            begin, end = end, end + len(choice) - 1
            ids[number, begin:end], parts[number, begin:end] = choice[:-1], part
            positions[number, begin:end] = np.arange(start, start + end - begin)
            picked += [number * width + i for i in (start - 1, *range(begin, end))]
            targets += choice
    first = next(model.parameters())
    device, family = first.device, family_of(model.config)
    masked: dict[str, Tensor] = {}
    if any(len(row.choices) > 1 for row in rows):
        masked["attention_mask"] = _mask(torch.from_numpy(parts).to(device), first.dtype)
        masked["position_ids"] = torch.from_numpy(positions).to(device)
    base = model.get_submodule(family.decoder)
    hidden = base(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **masked).last_hidden_state
    hidden = hidden.flatten(0, 1)[torch.tensor(picked, device=device)]
    head = model.get_submodule(family.lm_head)
    nll, greedy = [], []
    size = max(1, _LOGITS // text_config(model.config).vocab_size)
    for states, wanted in zip(hidden.split(size), torch.tensor(targets, device=device).split(size), strict=True):
        logits = head(states).float()
        nll.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(nll), torch.cat(greedy)


def _mask(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, [batch, 1, tokens, tokens]: a token sees the context and its own choice.

    parts: int64 [batch, tokens]. Padding comes last and is seen by nobody else.
    """
    keys, queries = parts[:, None, None, :], parts[:, None, :, None]
    seen = ((keys == 0) | (keys == queries)).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=parts.device).masked_fill_(~seen, torch.finfo(dtype).min)
