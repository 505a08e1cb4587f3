"""Thumbs: whether a person finds a single reply good. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.rows.row import Message
from rlhf_core.data.sources.feedback import Attempt, Candidate, FeedbackKind
from rlhf_core.errors import DataError
from rlhf_core.store import Store

THUMBS = FeedbackKind(
    "playground-thumbs", "thumbs", ("prompt", "completion", "label"), "judge some replies"
)
"""All thumbs of the run's store, as `data.unpaired.source`: rows of format `unpaired`."""


@dataclass(frozen=True)
class Thumb:
    """A thumb up or down.

    Attributes:
        prompt: the conversation before the reply; the last message is the user's.
        good: True for a thumb up.
        details: further fields of the record (run, sampling, user).
        attempt: to save it; a thumb that is saved twice is one record.
    """

    prompt: Sequence[Message]
    reply: Candidate
    good: bool
    details: dict[str, Any] = field(default_factory=dict)
    attempt: Attempt = field(default_factory=Attempt, compare=False)


def save_thumb(store: Store, thumb: Thumb) -> str:
    """Write a thumb; returns the path of its record.

    Raises:
        DataError: the reply is empty.
        StoreError: the store cannot be written to.
    """
    if not thumb.reply.text.strip():
        raise DataError("The thumb was not saved: the reply is empty.")
    record = {
        "prompt": [dict(message) for message in thumb.prompt],
        "completion": thumb.reply.text,
        "label": thumb.good,
        "model": thumb.reply.as_record(),
    }
    return THUMBS.save(store, record, thumb.details, thumb.attempt)
