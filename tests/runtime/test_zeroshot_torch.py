"""Continuations scored many at a time in torch, against one plain forward pass each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra `export` is not installed")
pytest.importorskip("transformers", reason="the extra `export` is not installed")

import torch
import transformers

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter import evaluate
from specquant.exporter.evaluate import continuation_scores

VOCAB, CONTEXT = 200, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}


def models() -> dict[str, Any]:
    """Full attention, a window in every layer, and a window in one of two layers."""
    llama = transformers.LlamaConfig(**SIZES)
    mistral = transformers.MistralConfig(**SIZES, sliding_window=12)
    kinds = ["sliding_attention", "full_attention"]
    gemma = transformers.Gemma3TextConfig(
        **SIZES, sliding_window=12, layer_types=kinds, head_dim=16, query_pre_attn_scalar=16
    )
    return {"llama": llama, "mistral": mistral, "gemma3": gemma}


@pytest.fixture(params=list(models()))
def model(request: pytest.FixtureRequest, rng: np.random.Generator) -> Any:
    torch.manual_seed(int(rng.integers(1 << 31)))
    return transformers.AutoModelForCausalLM.from_config(models()[request.param]).eval()


def asked(rng: np.random.Generator, model: Any) -> list[tuple[list[int], list[int]]]:
    """Questions with one to five choices of 1 to 7 tokens, in no order; some contexts are far beyond the model's own.

    The first choice is the token that greedy decoding would write, the fourth begins with it.
    """
    requests = []
    for number, length in enumerate([1, 2, 5, 9, 14, 20, 33, 47, 63, 64, 80, 130]):
        context = rng.integers(0, VOCAB, length).tolist()
        for choice in range(number % 5 + 1):
            tokens = rng.integers(0, VOCAB, rng.integers(1, 8)).tolist()
            if choice % 3 == 0:
                cut = context[-CONTEXT:]
                with torch.inference_mode():
                    tokens = [int(model(torch.tensor([cut])).logits[0, -1].argmax()), *tokens[1 : 1 + choice]]
            requests.append((context, tokens))
    return [requests[i] for i in rng.permutation(len(requests))]


def plainly(model: Any, context: list[int], choice: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor([(context + choice)[-(CONTEXT + 1) :]])
    with torch.inference_mode():
        logits = model(tokens[:, :-1]).logits[0, -len(choice) :].double()
    wanted = tokens[0, -len(choice) :]
    chosen = logits.log_softmax(-1)[torch.arange(len(choice)), wanted]
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_equals_a_plain_forward_pass(
    model: Any, rng: np.random.Generator, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_LOGITS", 5 * VOCAB)  # several blocks
    requests = asked(rng, model)
    done: list[int] = []
    found = continuation_scores(model, requests, batch_tokens, done.append)
    expected = [plainly(model, *request) for request in requests]
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], rtol=1e-4, atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}
    assert sum(done) == len(requests)


def test_a_context_is_computed_once(model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    inner = evaluate._token_scores

    def counted(model: Any, rows: Any) -> Any:
        shapes.append((len(rows), max(map(len, rows))))
        return inner(model, rows)

    monkeypatch.setattr(evaluate, "_token_scores", counted)
    context = rng.integers(0, VOCAB, 6).tolist()
    continuation_scores(model, [(context, [1, 2, 3]), (context, [4]), ([*context, 1], [5, 6])])
    assert sorted(shapes) == [(1, 8), (1, 8)]  # 6 + 2 + 0 of two choices, 7 + 1 of one


def test_an_answer_longer_than_the_context() -> None:
    llama = transformers.AutoModelForCausalLM.from_config(models()["llama"])
    with pytest.raises(SpecQuantError, match=f"an answer has {CONTEXT + 1} tokens"):
        continuation_scores(llama, [([1], [2] * (CONTEXT + 1))])
