"""A reply's text while it is generated, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopFilter:
    """Holds back what may become a stop string, over the borders of pieces.

    Attributes:
        stopped: a stop string has come; nothing after it is passed on, nor is the stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def add(self, text: str) -> str:
        """What of the text so far is certain to be part of the reply, and new."""
        if self.stopped:
            return ""
        held = self._held + text
        if found := [at for stop in self.stops if (at := held.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are a proper beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class ReplyText:
    """Text of a reply, token by token, without special tokens.

    Args:
        stops: stop strings. streamed: whether the pieces are wanted, or only the whole text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], streamed: bool) -> None:
        self._tokenizer = tokenizer
        self._filter = StopFilter(stops)
        self._ids: list[int] = []
        self._decoded = ""
        self._piecewise = streamed or bool(stops)
        self._stream: Any = None
        if self._piecewise and tokenizer.is_fast:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def add(self, token: int) -> str:
        """The new text, if it is wanted piece by piece."""
        self._ids.append(token)
        if not self._piecewise:
            return ""
        return self._filter.add(self._next(token))

    def end(self) -> str:
        """The rest of the text."""
        if self.stopped:
            return ""
        whole = self._whole()
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        return self._filter.add(rest) + self._filter.end()

    def _next(self, token: int) -> str:
        """New characters; none while a token ends within one."""
        if self._stream is not None:
            new = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        else:  # a tokenizer in Python: all again
            whole = self._whole()
            new = "" if whole.endswith("\ufffd") else whole[len(self._decoded) :]
        self._decoded += new
        return str(new)

    def _whole(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
