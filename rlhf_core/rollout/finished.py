"""Replies that are handed out as soon as they are finished, while others are still decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class FinishedReply(NamedTuple):
    """One reply; its tokens end with the first end-of-turn token or at the length limit."""

    row: int  # index of its prompt among those that were given
    ids: list[int]
    logprobs: list[float]  # nats, one for each token
    finished: bool  # ended with an end-of-turn token


OnFinished = Callable[[list[FinishedReply]], None]
"""Called after each decode step in which replies ended, with those, in the thread that decodes: it
must return at once, and not raise. A batch whose fast path fails is decoded again, so that its rows
come a second time; the rollout that is returned then holds the second ones."""


def finished_replies(
    rows: Sequence[int], ids: Tensor, logprobs: Tensor, finished: Sequence[bool]
) -> list[FinishedReply]:
    """Replies of equal length T', by one copy from the device for all of them.

    Args:
        rows: n indices. ids, logprobs: (n,T'). finished: n.
    """
    of_rows = zip(rows, ids.tolist(), logprobs.tolist(), finished, strict=True)
    return [FinishedReply(*reply) for reply in of_rows]
