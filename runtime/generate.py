"""A loaded model: text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import Manifest
from specquant.runtime.chat import ChatTemplate, Message, load_chat_template
from specquant.runtime.sampling import Sampling, choose
from specquant.runtime.session import Backend, Sequences
from specquant.runtime.stats import GenerationStats, peak_memory
from specquant.runtime.streaming import StopFilter, StreamDecoder

Prompt = str | Sequence[int]


class Model:
    """What `load` returns. Attributes: folder, manifest, context (tokens), tokenizer (a tokenizers.Tokenizer),
    chat_template (None if the model has none), stats (of the last call that generated; None before).
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, context: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self.context = context
        self.tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self.chat_template: ChatTemplate | None = load_chat_template(folder)
        self.stats: GenerationStats | None = None
        self._backend = backend

    def encode(self, text: str, add_special_tokens: bool = True) -> NDArray[np.int64]:
        """Token ids int64 [T] of a text. Raises SpecQuantError for a string that is not Unicode text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SpecQuantError(f"the text is not valid Unicode at character {error.start}: remove it") from None
        return np.array(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int64)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        repetition_penalty: float = 1.0,
    ) -> Generator[str, None, None]:
        """Continue a prompt (text or token ids); yields the new text in pieces of whole characters.

        Ends at an end-of-text token, before the first stop string, after max_new_tokens or when the context is
        full; `stats` then says which. temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off;
        the same seed gives the same text. Raises SpecQuantError at once for options out of range and for a prompt
        that is empty or longer than the context.
        """
        request = self._request(
            [prompt],
            max_new_tokens,
            stop,
            Sampling(temperature, top_k, top_p, repetition_penalty, seed),
        )
        return self._texts(request)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Continue several prompts together; the new text of each. Options and errors as in `generate`."""
        request = self._request(
            prompts,
            max_new_tokens,
            stop,
            Sampling(temperature, top_k, top_p, repetition_penalty, seed),
        )
        texts = [""] * len(prompts)
        for index, text in self._run(request):
            texts[index] += text
        return texts

    def chat(self, messages: Sequence[Message], **options: Any) -> Generator[str, None, None]:
        """Stream the assistant's answer to messages ({"role": …, "content": …}); options as in `generate`.

        The prompt comes from the model's chat template. Raises SpecQuantError when the model has none.
        """
        return self.generate(self.chat_prompt(messages).tolist(), **options)

    def chat_prompt(self, messages: Sequence[Message]) -> NDArray[np.int64]:
        """The token ids [T] that `chat` continues. The template writes special tokens itself, so none are added."""
        if self.chat_template is None:
            raise SpecQuantError(f"{self.manifest.name} has no chat template: use generate with a plain prompt")
        return self.encode(self.chat_template.render(messages), add_special_tokens=False)

    def logits(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [T, vocab] of token ids [T], from an empty cache. See `logit_blocks` for long ones."""
        result = np.empty((len(ids), self.manifest.model.vocab_size), np.float32)
        row = 0
        for block in self.logit_blocks(ids):
            result[row : row + len(block)] = block
            row += len(block)
        return result

    def logit_blocks(self, ids: Sequence[int] | NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """The rows of `logits` in order, as blocks [t, vocab]: a block is valid until the next is asked for."""
        return self._backend.sequences(1).prefill(0, self._check_ids(ids))

    def sequences(self, rows: int = 1) -> Sequences:
        """An empty batch with a KV cache of its own, for a caller that feeds token ids itself."""
        return self._backend.sequences(rows)

    def _request(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: str | Sequence[str] | None, sampling: Sampling
    ) -> _Request:
        if isinstance(prompts, str):
            raise SpecQuantError("generate_batch needs a list of prompts; for one prompt use generate")
        if max_new_tokens < 1:
            raise SpecQuantError(f"max_new_tokens = {max_new_tokens} is out of range: it must be 1 or more")
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if not all(stops):
            raise SpecQuantError("a stop string is empty: leave it out")
        encoded = [self._check_ids(self.encode(item) if isinstance(item, str) else item) for item in prompts]
        return _Request(encoded, max_new_tokens, stops, sampling)

    def _check_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        try:
            array = np.asarray(ids)
        except ValueError:  # lists of unequal length
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise SpecQuantError("a prompt must be a text or a list of token ids; for several use generate_batch")
        if array.size == 0:
            raise SpecQuantError("the prompt is empty: give at least one token of text")
        if array.size > self.context:
            raise SpecQuantError(
                f"the prompt has {array.size} tokens and the context holds {self.context}: shorten the prompt"
            )
        vocab = self.manifest.model.vocab_size
        if array.min() < 0 or array.max() >= vocab:
            raise SpecQuantError(f"the prompt has a token id outside 0…{vocab - 1}: is this the model's own tokenizer?")
        return array.astype(np.int64)

    def _texts(self, request: _Request) -> Generator[str, None, None]:
        with closing(self._run(request)) as pieces:  # the caller may stop early
            for _, text in pieces:
                yield text

    def _run(self, request: _Request) -> Generator[tuple[int, str], None, None]:
        """Yields (index of the prompt, new text). Keeps `stats`, also when the caller stops early."""
        clock = _Clock()
        answers = [
            _Answer(index, ids, self.tokenizer, request, self.context - len(ids) + 1)
            for index, ids in enumerate(request.prompts)
        ]
        try:
            yield from self._decode(request, answers, clock)
        finally:
            self.stats = _stats(answers, clock)

    def _decode(self, request: _Request, answers: list[_Answer], clock: _Clock) -> Iterator[tuple[int, str]]:
        if not answers:
            return
        clock.start()
        sequences = self._backend.sequences(len(answers))
        logits = np.stack([sequences.prefill_last(row, answer.ids) for row, answer in enumerate(answers)])
        ends = set(self.manifest.model.eos_token_ids)
        active = list(answers)  # active[row] is the answer in that row of `sequences`
        while True:
            seen = [answer.tokens for answer in active]
            tokens = choose(logits, request.sampling, seen, [answer.generator for answer in active])
            texts = [answer.add(int(token), ends) for answer, token in zip(active, tokens, strict=True)]
            clock.step()
            yield from ((answer.index, text) for answer, text in zip(active, texts, strict=True) if text)
            clock.start()
            for row in reversed(range(len(active))):  # backwards: the row that fills a gap has been looked at
                if active[row].finish_reason:
                    sequences.drop(row)
                    active[row] = active[-1]
                    active.pop()
            if not active:
                return
            logits = sequences.decode(np.array([answer.tokens[-1] for answer in active], np.int64))


@dataclass(frozen=True)
class _Request:
    prompts: list[NDArray[np.int64]]
    max_new_tokens: int
    stops: list[str]
    sampling: Sampling


class _Answer:
    """One prompt of a call and what has been generated for it."""

    def __init__(self, index: int, ids: NDArray[np.int64], tokenizer: Any, request: _Request, room: int) -> None:
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
class _Clock:
    """The time of each step, in seconds: first prefill, then decode steps."""

    steps: list[float] = field(default_factory=list)
    _since: float = 0.0

    def start(self) -> None:
        self._since = perf_counter()

    def step(self) -> None:
        self.steps.append(perf_counter() - self._since)


def _stats(answers: Iterable[_Answer], clock: _Clock) -> GenerationStats:
    answers = list(answers)
    reasons = {answer.finish_reason or "cancelled" for answer in answers}
    first, decode = sum(clock.steps[:1]), sum(clock.steps[1:])
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


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        text = " ".join(str(error).split())[:200]
        raise SpecQuantError(f"{path} cannot be read ({text}): re-export the model") from None
    tokenizer.no_truncation()  # a tokenizer.json may carry the limits of its training
    tokenizer.no_padding()
    return tokenizer
