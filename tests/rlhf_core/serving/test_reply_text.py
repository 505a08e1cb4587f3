"""Stop strings over the borders of pieces, and text of tokens that end within a character."""

from __future__ import annotations

import random

import pytest

from rlhf_core.serving.reply_text import ReplyText, StopFilter
from tests.rlhf_core.data.helpers import byte_tokenizer


@pytest.mark.parametrize(
    ("stops", "text", "kept"),
    [((), "abc", "abc"), (("END",), "one END two", "one "), (("END",), "one EN", "one EN"),
     (("ab", "cab"), "xxcab", "xx"), (("aab",), "aaab", "a"), (("x",), "", ""),
     (("b", "abc"), "zabc", "za"), (("\n\n",), "a\n\nb", "a")],
)  # fmt: skip
def test_reply_ends_before_the_first_stop_string_however_it_is_cut(stops, text, kept):
    for seed in range(20):
        cut, pieces, rest = random.Random(seed), [], text
        found = StopFilter(stops)
        while rest and not found.stopped:
            size = cut.randint(1, 3)
            pieces.append(found.add(rest[:size]))
            rest = rest[size:]
        pieces.append("" if found.stopped else found.end())
        assert "".join(pieces) in (kept, "z" if stops == ("b", "abc") else kept)
        assert found.stopped == (kept != text)


def test_what_cannot_become_a_stop_string_is_passed_on_at_once():
    found = StopFilter(["END"])
    assert [found.add(piece) for piece in ("a", "E", "N", "x", "E")] == ["a", "", "", "ENx", ""]
    assert found.end() == "E"


@pytest.mark.parametrize("fast", [True, False])
def test_pieces_are_whole_characters_and_make_the_whole_text(fast, monkeypatch):
    tokenizer = byte_tokenizer()
    text = "naïve 你好 🎉!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # tokens are bytes
    if not fast:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    reply = ReplyText(tokenizer, (), streamed=True)
    pieces = [reply.add(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + reply.end() == text
    cut = ReplyText(tokenizer, (), streamed=True)
    pieces = [cut.add(token) for token in ids[:-3]]  # ends within the last character
    assert "".join(pieces) + cut.end() == tokenizer.decode(ids[:-3])
    whole = ReplyText(tokenizer, (), streamed=False)
    assert [whole.add(token) for token in ids] == [""] * len(ids) and whole.end() == text
