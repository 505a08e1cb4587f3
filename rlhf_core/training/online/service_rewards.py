"""Rewards of services in online RL: asked while the rollout goes on, read when it is over.

B replies of a rollout (global).
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.rows.row import Message
from rlhf_core.errors import DataError
from rlhf_core.rewards.services import Answer, Item, Services
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.runtime.distributed import Group


@dataclass(frozen=True)
class ServiceScores:
    """What services say about a rollout, on every rank."""

    scores: dict[str, Tensor] = field(default_factory=dict)  # name of a service -> (B,)
    # "service/component" -> mean over the replies that have it
    components: dict[str, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float | None = None  # that this rank waited after the rollout; None: no services

    def metrics(self) -> dict[str, float]:
        """Means of the components as reward_SERVICE/COMPONENT, and services_seconds."""
        found = {f"reward_{name}": value for name, value in self.components.items()}
        return found if self.seconds is None else {**found, "services_seconds": self.seconds}


def asking(
    services: Services | None, tokenizer: Any, rows: Sequence[dict[str, Any]]
) -> OnFinished | None:
    """What asks the services about replies as they are finished; None without services.

    Args:
        rows: B rows of the prompts, one for each reply.
    """
    if services is None:
        return None

    def ask(replies: list[FinishedReply]) -> None:
        with contextlib.suppress(DataError):  # it is raised when the scores are read
            services.begin([item(tokenizer, rows[r.row], r.ids, r.finished) for r in replies])

    return ask


def item(tokenizer: Any, row: dict[str, Any], ids: Sequence[int], finished: bool) -> Item:
    """A reply as services see it: as text without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Item(json.loads(row["prompt"]), text, finished, row)


def service_scores(
    services: Services | None, group: Group, tokenizer: Any, rows: Sequence[dict[str, Any]],
    replies: Sequence[Sequence[int]], finished: Sequence[bool],
    prompts: Sequence[list[Message]] | None = None,
) -> ServiceScores:  # fmt: skip
    """The scores of replies; waits for those that are not there yet. Every rank calls.

    A reply's score is read on the rank that asked for it; those that nobody asked for are spread,
    or rank 0's where it asks for all.

    Args:
        rows, replies, finished: B each; replies as token ids.
        prompts: B conversations before the replies; None: the rows' prompts.

    Raises:
        DataError: a row lacks what a service needs.
        JudgeError: a service refused or kept failing, or could not judge too many replies.
    """
    if services is None:
        return ServiceScores()
    before = services.waited
    items = [item(tokenizer, *of) for of in zip(rows, replies, finished, strict=True)]
    if prompts is not None:
        items = [replace(one, prompt=prompt) for one, prompt in zip(items, prompts, strict=True)]
    owners = [0 if services.first_asks else i % group.size for i in range(len(items))]
    for rank, positions in reversed(list(enumerate(group.gather(services.asked(items))))):
        for position in positions:
            owners[position] = rank
    mine = [i for i, rank in enumerate(owners) if rank == group.rank]
    own = services.answers([items[i] for i in mine])  # per service
    by_reply = group.in_order(zip(mine, zip(*own, strict=True), strict=True))
    answers: list[list[Answer]] = [list(of) for of in zip(*by_reply, strict=True)]
    services.check(answers)
    found = ServiceScores(seconds=services.waited - before)
    for name, of_service in zip(services.names, answers, strict=True):
        found.scores[name] = torch.tensor([answer.score for answer in of_service])
        means = component_means(of_service)
        found.components.update({f"{name}/{part}": mean for part, mean in means.items()})
        found.failures.update(answer.failure for answer in of_service if answer.failure)
    return found


def component_means(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean of each component over the answers that have it."""
    found: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.components.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}
