"""Models as lm-eval sees them: they score continuations of a context, in our runtime or in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from lm_eval.api.model import TemplateLM

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.generate import Model
from specquant.runtime.perplexity import token_nll

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
        """Requests in the order of their tokens, so that each begins as the one before it does: what two have in
        common stays in the KV cache. Choices of one question share its context, WinoGrande's two the sentence's start.
        """
        scores: list[Score] = [(0.0, False)] * len(requests)
        sequences = self._model.sequences()
        held: list[int] = []
        for index in sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2]):
            _, context, continuation = requests[index]
            tokens = (context + continuation)[-(self._model.context + 1) :]  # as lm-eval's own models cut it
            first = len(tokens) - len(continuation) - 1  # the position that predicts the continuation's first token
            if first < 0:
                raise SpecQuantError(
                    f"an answer has {len(continuation)} tokens and the context holds {self._model.context}: "
                    "choose a longer --context"
                )
            fed = tokens[:-1]
            keep = min(_common(held, fed), first)
            sequences.rewind(0, keep)
            nll, greedy, row = 0.0, True, keep
            for block in sequences.prefill(0, np.array(fed[keep:], np.int64)):
                logits = block[max(0, first - row) :]
                row += len(block)
                targets = np.array(tokens[row - len(logits) + 1 : row + 1], np.int64)
                if len(logits):
                    nll += float(token_nll(logits, targets).sum())
                    greedy &= bool((logits.argmax(-1) == targets).all())
            held = fed
            scores[index] = (-nll, greedy)
            self._progress(1)
        return scores


class TorchLM(_ScoringLM):
    """A transformers model with its tokenizer, wherever its parameters are; the rest as in `continuation_scores`."""

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
        from specquant.exporter.evaluate import continuation_scores  # torch, which no device needs

        pairs = [(context, continuation) for _, context, continuation in requests]
        return continuation_scores(self._model, pairs, self._batch_tokens, self._progress)


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
