"""From prompts to tokens, step by step: chosen on the host, or by the device, which is then some steps ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.runtime.sampling import Sampling, choose, not_finite
from specquant.runtime.session import Backend, Choosing, Sequences
from specquant.runtime.stats import GenerationStats, peak_memory
from specquant.runtime.streaming import StopFilter, StreamDecoder

Pieces = Iterator[tuple[int, str]]  # index of the prompt, new text


@dataclass(frozen=True)
class Request:
    """One call of generate: prompts are token ids [T]."""

    prompts: list[NDArray[np.int64]]
    max_new_tokens: int
    stops: list[str]
    sampling: Sampling


class Answer:
    """One prompt of a call and what has been generated for it. room: tokens that fit the context after the prompt."""

    def __init__(self, index: int, ids: NDArray[np.int64], tokenizer: Any, request: Request, room: int) -> None:
        self.index = index
        self.ids = ids
        self.new_tokens = 0
        self.finish_reason = ""
        self.generator = request.sampling.generator(index)
        self._limit = min(request.max_new_tokens, room)
        self._all = np.concatenate([ids, np.zeros(self._limit, np.int64)])
        self._decoder = StreamDecoder(tokenizer, ids.tolist())
        self._stop = StopFilter(request.stops)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Prompt and new tokens, [T]."""
        return self._all[: len(self.ids) + self.new_tokens]

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self._limit - self.new_tokens

    def add(self, token: int, ends: set[int]) -> str:
        """Take a sampled token; the text that is ready now. Sets finish_reason when it is the last."""
        self._all[len(self.ids) + self.new_tokens] = token
        self.new_tokens += 1
        ended = token in ends
        text = "" if ended else self._stop.push(self._decoder.push(token))
        if ended or self._stop.stopped:
            self.finish_reason = "stop"
        elif self.new_tokens == self._limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._stop.push(self._decoder.flush()) + self._stop.flush()
        return text


@dataclass
class Clock:
    """The host's time of each step, in seconds: first prefill, then decode steps. device: what steps of decoding took
    there, where the device works on while the caller has a piece of text."""

    steps: list[float] = field(default_factory=list)
    device: float = 0.0
    _since: float = 0.0

    def start(self) -> None:
        self._since = perf_counter()

    def step(self) -> None:
        self.steps.append(perf_counter() - self._since)

    @property
    def decode(self) -> float:
        """Seconds after the first step: no less than the device worked, however long the caller lets it."""
        return max(sum(self.steps[1:]), self.device)


class Ahead:
    """Iterates over at most `limit` steps of decoding whose tokens the device chooses, several of them under way: the
    tokens int64 [rows] of each, and the seconds that it took there. ids [rows]: what the first step appends."""

    def __init__(
        self,
        sequences: Choosing,
        ids: NDArray[np.int64],
        sampling: Sampling,
        generators: Sequence[np.random.Generator],
        limit: int,
    ) -> None:
        self._sequences, self._left = sequences, limit
        self._generators = generators if sampling.temperature else ()
        sequences.start(ids, sampling.temperature, sampling.top_k)

    def stop(self) -> None:
        """Begin no more steps; those under way still come."""
        self._left = 0

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], float]]:
        sequences, under_way, fresh = self._sequences, 0, True
        while self._left or under_way:
            # One for each that was taken; more only while none is done, so that no token waits for later steps.
            if self._left and under_way < sequences.ahead and (fresh or not sequences.ready()):
                sequences.enqueue(np.array([generator.random() for generator in self._generators]))
                self._left -= 1
                under_way, fresh = under_way + 1, not under_way
            else:
                under_way, fresh = under_way - 1, True
                yield sequences.take()


class Decoding:
    """The steps of one call; `pieces` runs them all."""

    def __init__(self, answers: list[Answer], sampling: Sampling, ends: Iterable[int], clock: Clock) -> None:
        self._sampling, self._ends, self._clock = sampling, set(ends), clock
        self._active = list(answers)  # _active[row] is the answer in that row of the sequences

    def pieces(self, backend: Backend) -> Pieces:
        """Prefill, then steps until every answer is done."""
        self._clock.start()
        sequences = backend.sequences(len(self._active))
        logits = np.stack([sequences.prefill_last(row, answer.ids) for row, answer in enumerate(self._active)])
        yield from self._give(self._chosen(logits))
        choosing = sequences if isinstance(sequences, Choosing) and self._sampling.plain else None
        while self._drop(sequences):
            if choosing:
                yield from self._on_device(choosing)
            else:
                yield from self._give(self._chosen(sequences.decode(self._last())))

    def _on_device(self, sequences: Choosing) -> Pieces:
        """Steps until an answer is done; what is under way then still counts for the others."""
        generators = [answer.generator for answer in self._active]
        limit = min(answer.left for answer in self._active)
        steps = Ahead(sequences, self._last(), self._sampling, generators, limit)
        for tokens, seconds in steps:
            self._clock.device += seconds
            yield from self._give(tokens)
            if any(answer.finish_reason for answer in self._active):
                steps.stop()
            if all(answer.finish_reason for answer in self._active):
                return

    def _last(self) -> NDArray[np.int64]:
        return np.array([answer.tokens[-1] for answer in self._active], np.int64)

    def _chosen(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        seen = [answer.tokens for answer in self._active]
        return choose(logits, self._sampling, seen, [answer.generator for answer in self._active])

    def _give(self, tokens: NDArray[np.int64]) -> Pieces:
        """A token to each answer that is not done, and what text that makes ready."""
        given = [pair for pair in zip(self._active, tokens.tolist(), strict=True) if not pair[0].finish_reason]
        if any(token < 0 for _, token in given):
            raise not_finite()
        pieces = [(answer.index, answer.add(token, self._ends)) for answer, token in given]
        self._clock.step()
        yield from (piece for piece in pieces if piece[1])
        self._clock.start()

    def _drop(self, sequences: Sequences) -> bool:
        """Give up the rows of answers that are done. Whether others are left."""
        for row in reversed(range(len(self._active))):  # backwards: the row that fills a gap has been looked at
            if self._active[row].finish_reason:
                sequences.drop(row)
                self._active[row] = self._active[-1]
                self._active.pop()
        return bool(self._active)


def stats_of(answers: Iterable[Answer], clock: Clock) -> GenerationStats:
    """What the call of these answers cost, so far as it went."""
    answers = list(answers)
    reasons = {answer.finish_reason or "cancelled" for answer in answers}
    first, decode = sum(clock.steps[:1]), clock.decode
    prompt_tokens = sum(len(answer.ids) for answer in answers)
    new_tokens = sum(answer.new_tokens for answer in answers)
    later = sum(max(0, answer.new_tokens - 1) for answer in answers)
    return GenerationStats(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        time_to_first_token_s=first,
        prefill_tokens_per_s=prompt_tokens / first if first else 0.0,
        decode_tokens_per_s=later / decode if decode else 0.0,
        peak_memory_bytes=peak_memory(),
        finish_reason=next((reason for reason in ("cancelled", "length") if reason in reasons), "stop"),
    )
