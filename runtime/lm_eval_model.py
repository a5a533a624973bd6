"""Models as lm-eval sees them: they score continuations of a context, in our runtime or in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lm_eval.api.model import TemplateLM

from specquant.runtime.continuations import continuation_scores
from specquant.runtime.generate import Model

# lm-eval's: (context and continuation as text, their tokens); the answer is (log-likelihood, whether greedy decoding
# would write the continuation).
Request = tuple[tuple[str, str], list[int], list[int]]
Score = tuple[float, bool]


class _ScoringLM(TemplateLM):
    """encode: (text, whether with the special tokens that the tokenizer adds by itself) -> ids."""

    def __init__(self, encode: Callable[[str, bool], list[int]], eos: int, bos: int | None) -> None:
        super().__init__()
        self._encode = functools.lru_cache(16)(encode)  # the choices of a question come together and share its context
        self._eos, self._bos = eos, bos

    @property
    def eot_token_id(self) -> int:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation that has no context."""
        return self._eos if self._bos is None else self._bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """None: special tokens as the tokenizer adds them by itself."""
        return self._encode(string, add_special_tokens is not False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)  # the bar is ours
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        raise NotImplementedError("perplexity of a text is `specquant eval ppl`")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        raise NotImplementedError("the tasks of `specquant eval zeroshot` generate nothing")


class ArtifactLM(_ScoringLM):
    """An exported model in our runtime. progress is told how many requests are done."""

    def __init__(self, model: Model, progress: Callable[[int], None] = lambda done: None) -> None:
        about = model.manifest.model
        super().__init__(
            lambda text, special: model.encode(text, special).tolist(), about.eos_token_ids[0], about.bos_token_id
        )
        self._model = model
        self._progress = progress

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[Score]:
        return continuation_scores(self._model, [(context, choice) for _, context, choice in requests], self._progress)


class TorchLM(_ScoringLM):
    """A transformers model with its tokenizer, wherever its parameters are; the rest as in `exporter.evaluate`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int = 4096,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__(
            lambda text, special: tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"],
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
        )
        self._model, self._batch_tokens, self._progress = model, batch_tokens, progress

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[Score]:
        from specquant.exporter.evaluate import continuation_scores as in_torch  # which no device needs

        pairs = [(context, continuation) for _, context, continuation in requests]
        return in_torch(self._model, pairs, self._batch_tokens, self._progress)
