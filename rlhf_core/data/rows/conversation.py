"""A conversation as a text, for judges and people."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.data.rows.row import Message, message_text


def conversation(messages: Sequence[Message]) -> str:
    """The only user turn, or all turns with their roles; without the system's."""
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) == 1:
        return message_text(turns[0])
    return "\n".join(f"{m['role']}: {message_text(m)}" for m in turns)
