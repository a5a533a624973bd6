"""Text as it streams: whole characters, the same text however it is cut, stop strings cut off."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specquant.runtime.streaming import StopFilter, StreamDecoder

SAMPLES = ["a👩‍👩‍👧‍👦b", "日本の首都は東京です。", "e\u0301n\u0303 ş̌", "नमस्ते दुनिया", "Paris 🇫🇷!", " \n\tx  y"]


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, prompt or [])
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("text", SAMPLES)
def test_every_cut_gives_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert len(ids) > 3
    for length in range(len(ids) + 1):
        pieces = stream(tokenizer, ids[:length])
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.decode(ids[:length]).rstrip("\ufffd")
    # and joined on to a prompt, wherever the prompt ends at a character
    for cut in range(len(ids) + 1):
        if "\ufffd" not in tokenizer.decode(ids[:cut]):
            pieces = stream(tokenizer, ids[cut:], ids[:cut])
            assert "".join(pieces) == text[len(tokenizer.decode(ids[:cut])) :]


@pytest.mark.parametrize("text", SAMPLES)
def test_every_byte_alone(tokenizer: Tokenizer, text: str) -> None:
    """The worst tokens: one for every byte."""
    alphabet = {chr(byte): chr(byte) for byte in range(33, 127)}
    ids = [
        tokenizer.token_to_id(token)
        for byte in text.encode()
        for token in [alphabet.get(chr(byte)) or _byte_token(byte)]
    ]
    assert "".join(stream(tokenizer, ids)) == text


def _byte_token(byte: int) -> str:
    # GPT-2's table: what is not printable is shifted, in order, to 256 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@settings(max_examples=60)
@given(st.data())
def test_any_tokens_stream_to_their_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Also tokens that make no valid text, special ones among them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids).rstrip("\ufffd")


def test_text_that_depends_on_the_token_before() -> None:
    """SentencePiece style: the first token of a text loses its space, a later one keeps it."""
    words = {"▁The": 0, "▁capital": 1, "s": 2, "▁is": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert stream(tokenizer, [0, 1, 2, 3]) == ["The", " capital", "s", " is", ""]
    assert stream(tokenizer, [1, 3], prompt=[0]) == [" capital", " is", ""]


def cut(text: str, stops: list[str]) -> str:
    """The definition: read character by character until the text read so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    filter_ = StopFilter(stops)
    assert "".join(map(filter_.push, pieces)) + filter_.flush() == cut(text, stops)
    assert filter_.stopped == any(stop in text for stop in stops)


def test_held_text_is_as_short_as_it_can_be() -> None:
    filter_ = StopFilter(["###", "<end>"])
    assert [filter_.push(piece) for piece in ("ab#", "#", "c", "<e", "n", "!")] == ["ab", "", "##c", "", "", "<en!"]
