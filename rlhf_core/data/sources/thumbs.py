"""Thumbs: whether a person found a single reply good. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.rows.row import Message
from rlhf_core.data.sources.feedback import Candidate, Verdicts
from rlhf_core.errors import DataError
from rlhf_core.store import Store

THUMBS = Verdicts(
    "playground-thumbs", "thumbs", ("prompt", "completion", "label"), "judge some replies"
)
"""`data.unpaired.source` for all thumbs of the run's store: rows of format `unpaired`."""


@dataclass(frozen=True)
class Thumb:
    """A thumb up or down.

    Attributes:
        prompt: the conversation before the reply; the last message is the user's.
        good: up.
        details: what else is kept of it (run, sampling, who).
    """

    prompt: Sequence[Message]
    reply: Candidate
    good: bool
    details: dict[str, Any] = field(default_factory=dict)


def save_thumb(store: Store, thumb: Thumb) -> str:
    """Write a thumb; the path of its record.

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
        "model": thumb.reply.seen(),
    }
    return THUMBS.save(store, record, thumb.details)
