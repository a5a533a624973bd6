"""How likely a model finds continuations of contexts, which is all that multiple-choice tasks ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.generate import Model
from specquant.runtime.perplexity import token_nll


def continuation_scores(
    model: Model, requests: Sequence[tuple[list[int], list[int]]], progress: Callable[[int], None] = lambda done: None
) -> list[tuple[float, bool]]:
    """The log-likelihood (nats) of every continuation, and whether greedy decoding would write it.

    requests: (context, continuation), token ids; a context that is too long loses its beginning. They are taken in the
    order of their tokens, so that each begins as the one before it does: what two have in common stays in the KV cache.
    Choices of one question share its context, WinoGrande's two the start of the sentence. progress is told how many are
    done.
    Raises SpecQuantError if a continuation is longer than the model's context.
    """
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    sequences = model.sequences()
    held: list[int] = []
    for index in sorted(range(len(requests)), key=lambda i: requests[i][0] + requests[i][1]):
        context, continuation = requests[index]
        tokens = (context + continuation)[-(model.context + 1) :]  # as lm-eval's own models cut it
        first = len(tokens) - len(continuation) - 1  # the position that predicts the continuation's first token
        if first < 0:
            raise SpecQuantError(
                f"an answer has {len(continuation)} tokens and the context holds {model.context}: "
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
        progress(1)
    return scores


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
