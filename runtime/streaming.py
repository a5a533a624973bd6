"""From tokens to text as it grows: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # prompt tokens that show the tokenizer how the answer is joined on


class Decodes(Protocol):
    """The part of tokenizers.Tokenizer that is used here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class StreamDecoder:
    """Token by token into text; the pieces joined are the text of all tokens.

    A token may be a part of a character, and its text may depend on the token before it (a leading space). So a
    window of tokens is decoded with and without the new ones, and the difference is new text. It is held back while
    it ends in U+FFFD: the bytes so far do not make a character.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT:])
        self._shown = len(self._window)  # tokens of the window whose text is out already

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._window.append(token)
        text = self._pending()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """What is left when no token follows, without a character that was never finished."""
        text = self._pending()
        self._window, self._shown = [], 0
        return text.rstrip(_UNFINISHED)

    def _pending(self) -> str:
        shown = self._tokenizer.decode(self._window[: self._shown], skip_special_tokens=True)
        return self._tokenizer.decode(self._window, skip_special_tokens=True)[len(shown) :]


class StopFilter:
    """Passes text on up to the first stop string; of several, the one that is complete first.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that no stop string can take back. Nothing once one was found (`stopped`)."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = self._possible_start()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def flush(self) -> str:
        """What was held back, when no text follows."""
        text, self._held = "" if self.stopped else self._held, ""
        return text

    def _possible_start(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
