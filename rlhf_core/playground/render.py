"""Conversations as chat bubbles, with the score under each reply.

A reply is shown as text. What looks like HTML or Markdown in it stays text too: a model, or whoever
wrote its training data, could otherwise load images from elsewhere, ask for a password, or cover
the page. Gradio's chat renders HTML even without Markdown, so everything is escaped here.
"""

from __future__ import annotations

import html
import string
from collections.abc import Sequence

from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.replies import PartialReply
from rlhf_core.playground.texts import translate

COLUMNS = 4
"""Largest number of models side by side."""

Bubbles = list[dict[str, str]]


def shown_name(language: str, conversation: Conversation, i: int) -> str:
    """The name of a model, or A, B, ... while names are hidden."""
    if conversation.hidden:
        return translate(language, "model", letter=string.ascii_uppercase[i])
    return conversation.choices[i].name


def bubbles(
    language: str, conversation: Conversation, replies: Sequence[PartialReply]
) -> list[Bubbles]:
    """The bubbles of each model's column, during generation and afterwards.

    Args:
        replies: the newest reply of each model.
    """
    shown = []
    newest_scored = not conversation.hidden
    for earlier, scores, reply in zip(
        conversation.prompts, conversation.scores, replies, strict=True
    ):
        column: Bubbles = []
        remaining = iter(scores)  # after `finish` also the newest one
        for message in earlier:
            content = html.escape(message["content"])
            if message["role"] == "assistant":
                content += _score(language, next(remaining, None), "")
            column.append({"role": message["role"], "content": content})
        newest = _newest(language, reply, newest_scored)
        column.append({"role": "assistant", "content": newest})
        shown.append(column)
    return shown


def _newest(language: str, reply: PartialReply, scored: bool) -> str:
    if reply.state == "failed":
        return html.escape(translate(language, "failed", error=reply.error))
    if reply.state == "waiting":
        return _note(translate(language, "waiting"))
    text = html.escape(reply.text)
    if not reply.text.strip():
        text = _note(
            translate(language, "generating" if reply.state == "generating" else "no_text")
        )
    if reply.dropped:
        text += _small(translate(language, "dropped", count=reply.dropped))
    return text + (_score(language, reply.score, reply.score_error) if scored else "")


def _score(language: str, score: float | None, error: str) -> str:
    if error:
        return _small(translate(language, "no_score", error=error))
    return "" if score is None else _small(translate(language, "score", score=score))


def _small(text: str) -> str:
    return f'<div class="score">{html.escape(text)}</div>'


def _note(text: str) -> str:
    return f'<span class="note">{html.escape(text)}</span>'
