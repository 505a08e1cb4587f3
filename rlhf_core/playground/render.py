"""Conversations as the page shows them: bubbles, with the score under each reply."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_core.playground.asking import PartialReply
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.texts import say

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message

COLUMNS = 4
"""Models side by side at most."""

Bubbles = list[dict[str, str]]


def bubbles(
    language: str,
    talk: Conversation,
    asked: Sequence[Sequence[Message]],
    replies: Sequence[PartialReply],
) -> list[Bubbles]:
    """What each model's column shows while a question is being answered, and afterwards.

    Args:
        talk: before `finish`, so with the earlier turns' scores.
        asked: the conversations that the models were given.
    """
    shown = []
    for earlier, scores, reply in zip(asked, talk.scores, replies, strict=True):
        column: Bubbles = []
        left = iter(scores)
        for message in earlier:
            content = message["content"]
            if message["role"] == "assistant":
                content = _with_score(language, content, next(left, None), "")
            column.append({"role": message["role"], "content": content})
        column.append({"role": "assistant", "content": _newest(language, reply)})
        shown.append(column)
    return shown


def _newest(language: str, reply: PartialReply) -> str:
    if reply.state == "failed":
        return say(language, "failed", error=reply.error)
    if reply.state == "waiting":
        return say(language, "waiting")
    text = reply.text
    if not text.strip():
        text = say(language, "talking" if reply.state == "talking" else "no_text")
    if reply.dropped:
        text += _small(say(language, "dropped", count=reply.dropped))
    return _with_score(language, text, reply.score, reply.score_error)


def _with_score(language: str, text: str, score: float | None, error: str) -> str:
    if error:
        return text + _small(say(language, "no_score", error=error))
    return text if score is None else text + _small(say(language, "score", score=score))


def _small(text: str) -> str:
    return f'\n\n<div class="score">{html.escape(text)}</div>'
