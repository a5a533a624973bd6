"""Generation on a real artifact: a tiny Llama, exported by exporter.graph and run by ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library import library_path
from specquant.runtime import Model, load

Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]
PROMPTS = ["The capital of France is", "日", "e\u0301n Der Fluß fließt", "x"]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, threads=1, custom_ops=False)


@pytest.fixture(scope="module")
def float_model(float_folder: Path) -> Model:
    return load(float_folder, threads=1, custom_ops=False)


def test_greedy_is_transformers(float_model: Model, llama: Any) -> None:
    import torch

    for prompt in PROMPTS:
        ids = float_model.encode(prompt)
        tokens = torch.tensor(ids[None])
        with torch.no_grad():
            expected = llama.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=40, do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
            logits = llama(tokens).logits[0].numpy()
        assert np.abs(float_model.logits(ids) - logits).max() < 1e-4 * np.abs(logits).max()
        text = "".join(float_model.generate(prompt, max_new_tokens=40))
        assert text == float_model.tokenizer.decode([*ids, *expected])[len(prompt) :].rstrip("\ufffd")


def test_a_batch_is_each_alone(float_model: Model) -> None:
    model = float_model
    for options in ({}, {"temperature": 0.9, "top_k": 20, "seed": 5}):
        alone = ["".join(model.generate(prompt, max_new_tokens=30, **options)) for prompt in PROMPTS]
        batch = model.generate_batch(PROMPTS, max_new_tokens=30, **options)
        if not options:
            assert batch == alone
        assert batch[0] == alone[0]  # rows draw their own numbers, the first as one prompt does
        assert batch == model.generate_batch(PROMPTS, max_new_tokens=30, **options)
    assert model.stats is not None
    assert model.stats.prompt_tokens == sum(len(model.encode(prompt)) for prompt in PROMPTS)
    assert model.generate_batch([]) == []


def test_seeds(model: Model) -> None:
    texts = {seed: "".join(model.generate("x", max_new_tokens=30, temperature=1.5, seed=seed)) for seed in (1, 2)}
    assert texts[1] != texts[2]
    assert "".join(model.generate("x", max_new_tokens=30, temperature=1.5, seed=1)) == texts[1]


def test_steps_and_blocks_equal_one_pass(float_model: Model, rng: np.random.Generator) -> None:
    # Not the quantised model: another block size sums in another order, and one activation that rounds the other
    # way moves its logits by more than any tolerance worth having.
    model = float_model
    ids = rng.integers(3, 320, 61)
    whole = model.logits(ids)
    backend: Any = model._backend
    backend.block, kept = 7, backend.block
    try:
        np.testing.assert_allclose(model.logits(ids), whole, rtol=1e-4, atol=1e-4)
        sequences = backend.sequences(1)
        parts = [block.copy() for block in sequences.prefill(0, ids[:20])]
        parts += [sequences.decode(ids[t : t + 1]).copy() for t in range(20, 61)]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-4)
    finally:
        backend.block = kept


@pytest.mark.parametrize("block", [7, 512])
def test_the_last_logits_of_a_prompt(
    float_model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """In rows of different length, with blocks shorter than the prompt or not, and what comes after them."""
    monkeypatch.setattr(float_model._backend, "prompt_block", block)
    prompts = [rng.integers(3, 320, length) for length in (30, 1, 8)]
    sequences = float_model._backend.sequences(3)
    last = [sequences.prefill_last(row, ids) for row, ids in enumerate(prompts)]
    after = sequences.decode(np.array([5, 6, 7])).copy()
    for row, ids in enumerate(prompts):
        whole = float_model.logits(np.append(ids, 5 + row))
        np.testing.assert_allclose(last[row], whole[-2], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(after[row], whole[-1], rtol=1e-4, atol=1e-4)


def test_a_cache_that_grows(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate_batch(PROMPTS, max_new_tokens=40)
    monkeypatch.setattr("specquant.runtime.cache._FIRST_CAPACITY", 4)
    assert model.generate_batch(PROMPTS, max_new_tokens=40) == expected


def test_float16(half_folder: Path, float_model: Model, rng: np.random.Generator) -> None:
    half = load(half_folder, threads=1, custom_ops=False)
    ids = rng.integers(3, 320, 50)
    expected = float_model.logits(ids)
    logits = half.logits(ids)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < 0.03 * np.abs(expected).max()
    sequences = half._backend.sequences(1)
    steps = [sequences.decode(ids[t : t + 1]).copy() for t in range(20)]
    assert np.abs(np.concatenate(steps) - expected[:20]).max() < 0.03 * np.abs(expected).max()


def test_pieces_and_stop_strings(model: Model) -> None:
    text = "".join(model.generate(PROMPTS[0], max_new_tokens=40))
    assert len(text) > 12
    for start in (0, 3, 8):
        stop = text[start : start + 4]
        pieces = list(model.generate(PROMPTS[0], max_new_tokens=40, stop=["never so", stop]))
        assert "".join(pieces) == text[: text.index(stop)]
        assert model.stats is not None
        assert model.stats.finish_reason == "stop"
    assert "".join(model.generate(PROMPTS[0], max_new_tokens=40, stop=text[-1] + "no")) == text


def test_end_of_text_token(folder: Path, model: Model, tmp_path: Path, edit_manifest: Edit) -> None:
    sequences = model._backend.sequences(1)
    ids = model.encode(PROMPTS[0])
    logits = [block[-1].copy() for block in sequences.prefill(0, ids)][-1]
    tokens = [int(logits.argmax())]
    while len(tokens) < 20:
        tokens.append(int(sequences.decode(np.array(tokens[-1:])).argmax()))
    end = next(token for token in tokens if token not in tokens[:3])
    shutil.copytree(folder, tmp_path / "model")
    edit_manifest(tmp_path / "model", lambda content: content["model"].update(eos_token_ids=[0, end]))
    ending = load(tmp_path / "model", threads=1, custom_ops=False)
    text = "".join(ending.generate(PROMPTS[0], max_new_tokens=40))
    kept = tokens[: tokens.index(end)]
    assert text == model.tokenizer.decode([*ids, *kept])[len(PROMPTS[0]) :].rstrip("\ufffd")
    assert ending.stats is not None
    assert (ending.stats.finish_reason, ending.stats.new_tokens) == ("stop", len(kept) + 1)


def test_chat_is_generate_on_the_rendered_prompt(model: Model) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer.encode(rendered, add_special_tokens=False).ids
    assert model.chat_prompt(messages).tolist() == ids
    assert "".join(model.chat(messages, max_new_tokens=12)) == "".join(model.generate(ids, max_new_tokens=12))


def test_statistics(model: Model) -> None:
    pieces = model.generate(PROMPTS[0], max_new_tokens=9)
    assert sum(1 for _ in pieces) <= 10
    stats = model.stats
    assert stats is not None
    assert (stats.new_tokens, stats.finish_reason) == (9, "length")
    assert stats.prefill_tokens_per_s == pytest.approx(stats.prompt_tokens / stats.time_to_first_token_s)
    assert stats.decode_tokens_per_s > 0
    assert stats.peak_memory_bytes is None or stats.peak_memory_bytes > 1e7
    unfinished = model.generate(PROMPTS[0], max_new_tokens=30)
    next(unfinished)
    unfinished.close()
    assert model.stats is not None
    assert model.stats.finish_reason == "cancelled"


def test_two_answers_at_once(model: Model) -> None:
    """Each call has a cache of its own."""
    alone = ["".join(model.generate(prompt, max_new_tokens=15)) for prompt in PROMPTS[:2]]
    first, second = (model.generate(prompt, max_new_tokens=15) for prompt in PROMPTS[:2])
    texts = ["", ""]
    for _ in range(20):
        texts[0] += next(first, "")
        texts[1] += next(second, "")
    assert texts == alone


def test_the_context_is_the_limit(model: Model) -> None:
    assert model.context == 96
    ids = [5] * 96
    "".join(model.generate(ids))
    assert model.stats is not None
    assert (model.stats.new_tokens, model.stats.finish_reason) == (1, "length")
    model.generate_batch([ids[:90], ids[:3], ids[:94]], max_new_tokens=20)
    assert model.stats.new_tokens <= 7 + 20 + 3
    with pytest.raises(SpecQuantError, match="97 tokens and the context holds 96"):
        model.generate([5] * 97)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([320], {}, "token id outside"),
        ([-1], {}, "token id outside"),
        (["a", "b"], {}, "use generate_batch"),
        ([[1, 2], [3]], {}, "use generate_batch"),
        ("a\udcff", {}, "not valid Unicode at character 1"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ("x", {"stop": ["a", ""]}, "stop string is empty"),
        ("x", {"top_p": 2}, "top_p = 2"),
    ],
)
def test_mistakes_are_found_at_once(model: Model, prompt: Any, options: dict, message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        model.generate(prompt, **options)  # not at the first piece


def test_a_string_is_no_batch(model: Model) -> None:
    with pytest.raises(SpecQuantError, match="list of prompts"):
        model.generate_batch("x")


def test_rank(folder: Path, float_folder: Path, model: Model) -> None:
    ids = model.encode(PROMPTS[0])
    full = model.logits(ids)
    assert (load(folder, threads=1, custom_ops=False, rank=4).logits(ids) == full).all()
    changed = [load(folder, threads=1, custom_ops=False, rank=rank).logits(ids) for rank in (0, 2)]
    assert np.linalg.norm(changed[0] - full) > np.linalg.norm(changed[1] - full) > 0
    with pytest.raises(SpecQuantError, match=r"rank = 5 is out of range: .* 0 to 4"):
        load(folder, rank=5, custom_ops=False)
    with pytest.raises(SpecQuantError, match="has no spectral branch"):
        load(float_folder, rank=1, custom_ops=False)


def test_our_kernels_and_the_functions_agree(folder: Path, model: Model) -> None:
    try:
        library_path()
    except SpecQuantError as error:
        pytest.skip(str(error))
    kernels = load(folder, threads=2)
    ids = model.encode(PROMPTS[0])
    expected = model.logits(ids)
    assert np.abs(kernels.logits(ids) - expected).max() < 1e-2 * np.abs(expected).max()
    assert kernels.generate_batch(PROMPTS, max_new_tokens=5) == model.generate_batch(PROMPTS, max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is not supported: this version runs on cpu, cuda"),
        ({"threads": 0}, "threads = 0"),
        ({"context": 97}, "context = 97 .* 1 to 96"),
        ({"context": 0}, "context = 0"),
    ],
)
def test_options_of_load(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        load(folder, custom_ops=False, **options)
    short = load(folder, custom_ops=False, context=8)
    with pytest.raises(SpecQuantError, match="the context holds 8"):
        short.generate([5] * 9)


def _set_size(content: dict[str, Any], path: Path) -> None:
    content["files"][path.name]["size"] = path.stat().st_size


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.onnx", lambda content: content[: len(content) // 2], r"model\.onnx cannot be loaded"),
        ("model.onnx", lambda content: b"x" * 100, r"model\.onnx cannot be loaded"),
        ("model.onnx.data", lambda content: content[: len(content) // 2], r"model\.onnx\.data cannot be loaded"),
        ("model.onnx.data", lambda content: b"x", r"model\.onnx\.data cannot be loaded"),
        ("tokenizer.json", lambda content: content[:100], r"tokenizer\.json cannot be read"),
    ],
)
def test_damage_that_the_sizes_do_not_show(
    folder: Path, tmp_path: Path, edit_manifest: Edit, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    edit_manifest(copy, lambda content: _set_size(content, copy / name))
    with pytest.raises(SpecQuantError, match=message) as caught:
        load(copy, custom_ops=False)
    assert "\n" not in str(caught.value)


def test_a_graph_of_another_model(folder: Path, tmp_path: Path, edit_manifest: Edit) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    for change in ({"num_layers": 3}, {"num_kv_heads": 4}, {"vocab_size": 400}, {"float_type": "float16"}):
        edit_manifest(copy, lambda content, change=change: content["model"].update(change))
        with pytest.raises(SpecQuantError, match="not the graph that"):
            load(copy, custom_ops=False)


def test_no_chat_template(folder: Path, tmp_path: Path, edit_manifest: Edit) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    edit_manifest(copy, lambda content: content["files"].pop("chat_template.jinja"))
    plain = load(copy, custom_ops=False)
    with pytest.raises(SpecQuantError, match="no chat template"):
        plain.chat([{"role": "user", "content": "x"}])
