"""How fast a loaded model is here, in the manner of llama-bench, and how near the limits of the machine that comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import Manifest
from specquant.runtime.decoding import Ahead
from specquant.runtime.generate import Model
from specquant.runtime.sampling import Sampling, not_finite
from specquant.runtime.session import Choosing

FIRST_TOKEN_PROMPT = 32  # tokens
_NOT_READ = ("embedding", "rotary")  # kinds of tensors of which a token reads a row


@dataclass(frozen=True)
class Timing:
    """`runs` measurements of one thing, in seconds."""

    tokens: int
    seconds: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Tokens a second: the median, the slowest and the fastest run."""
        rates = {"slowest": self.tokens / max(self.seconds), "fastest": self.tokens / min(self.seconds)}
        return {"tokens": self.tokens, "runs": len(self.seconds), "tokens_per_s": self.tokens_per_s, **rates}


@dataclass(frozen=True)
class Bench:
    """prefill of a prompt (logits of its last token), decode of tokens one by one from an empty context, each chosen
    greedily, and the first token of a prompt of 32: None where not asked for."""

    prefill: Timing | None
    decode: Timing | None
    first_token: Timing


@dataclass(frozen=True)
class Work:
    """What a token costs at least: prefill_ops, the multiplications and additions of the quantised linears (neither
    attention nor branch nor head); decode_bytes, the weights that it reads, and the KV cache half-way."""

    prefill_ops: int
    decode_bytes: int


def bench(
    model: Model, prompt: int, new_tokens: int, runs: int, progress: Callable[[int], None] | None = None
) -> Bench:
    """Time `runs` rounds of everything, in turns, after one that is not counted; `progress` is told each round.

    prompt and new_tokens in tokens, 0 to leave that out. Raises SpecQuantError if they do not fit the context.
    """
    for name, value, least in (("prompt", prompt, 0), ("new_tokens", new_tokens, 0), ("runs", runs, 1)):
        if value < least:
            raise SpecQuantError(f"{name} = {value} is out of range: it must be {least} or more")
    longest = max(prompt, new_tokens + 1, FIRST_TOKEN_PROMPT)
    if longest > model.context:
        raise SpecQuantError(
            f"{longest} tokens exceed the context of {model.context}: ask for a shorter prompt or fewer tokens"
        )
    ids = np.random.default_rng(0).integers(0, model.manifest.model.vocab_size, longest)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(runs + 1):
        if prompt:
            times[0].append(_first_token(model, ids[:prompt]))
        if new_tokens:
            times[1].append(_decode(model, ids[:1], new_tokens))
        times[2].append(_first_token(model, ids[:FIRST_TOKEN_PROMPT]))
        if progress:
            progress(1)
    prefill, decode, first = (found[1:] for found in times)
    return Bench(
        Timing(prompt, prefill) if prefill else None,
        Timing(new_tokens, decode) if decode else None,
        Timing(FIRST_TOKEN_PROMPT, first),
    )


def work(manifest: Manifest, new_tokens: int) -> Work:
    """Of one token, in a decode of `new_tokens`."""
    ops = sum(2 * layer.in_features * layer.out_features for layer in manifest.layers)
    kinds = manifest.bits.tensor_bytes
    read = sum(size for kind, size in kinds.items() if kind not in _NOT_READ)
    if manifest.model.tied_embeddings and manifest.model.head_bits == 16:  # the head reads all of the table
        read += kinds.get("embedding", 0)
    return Work(ops, read + manifest.model.cache_bytes_per_token * (new_tokens // 2))


def as_dict(result: Bench) -> dict[str, Any]:
    """For JSON; first_token in milliseconds."""
    first = result.first_token
    return {
        "prefill": result.prefill and result.prefill.as_dict(),
        "decode": result.decode and result.decode.as_dict(),
        "first_token": {"prompt_tokens": first.tokens, "median_ms": 1e3 * median(first.seconds)},
    }


def _first_token(model: Model, ids: Any) -> float:
    since = perf_counter()
    model.sequences().prefill_last(0, ids).argmax()
    return perf_counter() - since


def _decode(model: Model, ids: Any, count: int) -> float:
    """Seconds of `count` steps, as generate makes them by default."""
    sequences = model.sequences()
    token = sequences.prefill_last(0, ids).argmax()
    since = perf_counter()
    if isinstance(sequences, Choosing):
        for tokens, _ in Ahead(sequences, np.array([token]), Sampling(), (), count):
            if tokens[0] < 0:
                raise not_finite()
        return perf_counter() - since
    for _ in range(count):
        token = sequences.decode(np.array([token]))[0].argmax()
    return perf_counter() - since


def limits_dict(limits: Any, result: Bench, needed: Work) -> dict[str, Any]:
    """The limits, and which share of them prefill and decode reach."""
    shares: dict[str, float] = {}
    if result.prefill:
        shares["prefill_tops"] = needed.prefill_ops * result.prefill.tokens_per_s / 1e12
        shares["prefill_of_limit"] = 1e3 * shares["prefill_tops"] / limits.gops
    if result.decode:
        shares["decode_gbps"] = needed.decode_bytes * result.decode.tokens_per_s / 1e9
        shares["decode_of_limit"] = shares["decode_gbps"] / limits.gbps
    return asdict(limits) | shares
