"""Votes: which of two replies to the same conversation a person prefers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_core.data.rows.row import Message
from rlhf_core.data.sources.feedback import VERDICT, Attempt, Candidate, FeedbackKind
from rlhf_core.errors import DataError
from rlhf_core.store import Store

VOTES = FeedbackKind(
    "playground-votes", "votes", ("prompt", "chosen", "rejected"), "compare some replies"
)
"""All votes of the run's store, as `data.preference.source`: rows of format `preference`. The data
card counts ties and "both bad", which are no pairs."""

Verdict = Literal["tie", "both_bad"]


@dataclass(frozen=True)
class Vote:
    """One comparison of two replies.

    Attributes:
        prompt: the conversation before the replies; the last message is the user's.
        details: further fields of the record (run, sampling, user).
        attempt: to save it; a vote that is saved twice is one record.
    """

    prompt: Sequence[Message]
    chosen: Candidate
    rejected: Candidate
    details: dict[str, Any] = field(default_factory=dict)
    attempt: Attempt = field(default_factory=Attempt, compare=False)

    def problem(self) -> str:
        """Why the replies are no preference pair: "empty" or "identical"; "" if they are one."""
        if not self.chosen.text.strip() or not self.rejected.text.strip():
            return "empty"
        return "identical" if self.chosen.text.strip() == self.rejected.text.strip() else ""


@dataclass(frozen=True)
class Undecided:
    """A comparison in which no reply is better.

    Attributes:
        replies: all of them, two or more.
        verdict: whether they are equally good, or all bad.
        details, attempt: as of a `Vote`.
    """

    prompt: Sequence[Message]
    replies: Sequence[Candidate]
    verdict: Verdict
    details: dict[str, Any] = field(default_factory=dict)
    attempt: Attempt = field(default_factory=Attempt, compare=False)


def save_undecided(store: Store, vote: Undecided) -> str:
    """Write a tie or "both bad"; returns the path of its record.

    Raises:
        StoreError: the store cannot be written to.
    """
    record = {
        "prompt": [dict(message) for message in vote.prompt],
        VERDICT: vote.verdict,
        "replies": [reply.text for reply in vote.replies],
        "models": [reply.as_record() for reply in vote.replies],
    }
    return VOTES.save(store, record, vote.details, vote.attempt)


def save_vote(store: Store, vote: Vote) -> str:
    """Write a vote; returns the path of its record.

    Raises:
        DataError: a reply is empty, or both are the same.
        StoreError: the store cannot be written to.
    """
    if problem := vote.problem():
        raise DataError(f"The vote was not saved: the replies are {problem}, so they are no pair.")
    record = {
        "prompt": [dict(message) for message in vote.prompt],
        "chosen": vote.chosen.text,
        "rejected": vote.rejected.text,
        "models": {"chosen": vote.chosen.as_record(), "rejected": vote.rejected.as_record()},
    }
    return VOTES.save(store, record, vote.details, vote.attempt)
