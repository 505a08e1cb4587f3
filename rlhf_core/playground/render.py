"""Conversations as chat bubbles, with the score under each reply."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.replies import PartialReply
from rlhf_core.playground.texts import translate

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message

COLUMNS = 4
"""Largest number of models side by side."""

Bubbles = list[dict[str, str]]


def bubbles(
    language: str,
    conversation: Conversation,
    prompts: Sequence[Sequence[Message]],
    replies: Sequence[PartialReply],
) -> list[Bubbles]:
    """The bubbles of each model's column, during generation and afterwards.

    Args:
        conversation: before `finish`, so it has the scores of the earlier turns only.
        prompts: the messages that each model was given.
        replies: the newest reply of each model.
    """
    shown = []
    for earlier, scores, reply in zip(prompts, conversation.scores, replies, strict=True):
        column: Bubbles = []
        remaining = iter(scores)
        for message in earlier:
            content = message["content"]
            if message["role"] == "assistant":
                content = _with_score(language, content, next(remaining, None), "")
            column.append({"role": message["role"], "content": content})
        column.append({"role": "assistant", "content": _newest(language, reply)})
        shown.append(column)
    return shown


def _newest(language: str, reply: PartialReply) -> str:
    if reply.state == "failed":
        return translate(language, "failed", error=reply.error)
    if reply.state == "waiting":
        return translate(language, "waiting")
    text = reply.text
    if not text.strip():
        text = translate(language, "generating" if reply.state == "generating" else "no_text")
    if reply.dropped:
        text += _small(translate(language, "dropped", count=reply.dropped))
    return _with_score(language, text, reply.score, reply.score_error)


def _with_score(language: str, text: str, score: float | None, error: str) -> str:
    if error:
        return text + _small(translate(language, "no_score", error=error))
    return text if score is None else text + _small(translate(language, "score", score=score))


def _small(text: str) -> str:
    return f'\n\n<div class="score">{html.escape(text)}</div>'
