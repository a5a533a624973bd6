"""A loaded model: text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import Manifest
from specquant.runtime.chat import ChatTemplate, Message, load_chat_template
from specquant.runtime.decoding import Answer, Clock, Decoding, Request, stats_of
from specquant.runtime.sampling import Sampling
from specquant.runtime.session import Backend, Sequences
from specquant.runtime.stats import GenerationStats

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
    ) -> Request:
        if isinstance(prompts, str):
            raise SpecQuantError("generate_batch needs a list of prompts; for one prompt use generate")
        if max_new_tokens < 1:
            raise SpecQuantError(f"max_new_tokens = {max_new_tokens} is out of range: it must be 1 or more")
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if not all(stops):
            raise SpecQuantError("a stop string is empty: leave it out")
        encoded = [self._check_ids(self.encode(item) if isinstance(item, str) else item) for item in prompts]
        return Request(encoded, max_new_tokens, stops, sampling)

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

    def _texts(self, request: Request) -> Generator[str, None, None]:
        with closing(self._run(request)) as pieces:  # the caller may stop early
            for _, text in pieces:
                yield text

    def _run(self, request: Request) -> Generator[tuple[int, str], None, None]:
        """Yields (index of the prompt, new text). Keeps `stats`, also when the caller stops early."""
        clock = Clock()
        answers = [
            Answer(index, ids, self.tokenizer, request, self.context - len(ids) + 1)
            for index, ids in enumerate(request.prompts)
        ]
        try:
            if answers:
                decoding = Decoding(answers, request.sampling, self.manifest.model.eos_token_ids, clock)
                yield from decoding.pieces(self._backend)
        finally:
            self.stats = stats_of(answers, clock)


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
