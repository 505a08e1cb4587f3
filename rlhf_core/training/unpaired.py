"""Single replies that are labelled good or bad, and log-probabilities of a row's response after
its own prompt or another row's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.sampling import Sampling
from rlhf_core.errors import DataError
from rlhf_core.jobs import KTOJob
from rlhf_core.nn.modules import Policy
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.preference import Reply, pair_response_lengths, response_logps
from rlhf_core.training.strategy import Strategy

Combination = tuple[int, int]  # number of the prompt's row, number of the response's row
Logps = dict[Combination, float]  # nats


class LabelledReplies:
    """Replies that are good or bad: unpaired rows, or pairs taken apart into two rows each."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.paired = rows, rows.purpose == "preference"

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.paired else 1)

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows with prompt_ids, completion_ids and label; a pair's chosen reply comes first."""
        if not self.paired:
            return self.rows.take(numbers)
        pairs = self.rows.take([number // 2 for number in numbers])
        keys = ("chosen_ids", "rejected_ids")
        return [
            {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[keys[number % 2]],
             "label": number % 2 == 0, "row": pair["row"]}
            for pair, number in zip(pairs, numbers, strict=True)
        ]  # fmt: skip

    @cached_property
    def sampling(self) -> Sampling | None:
        """How an epoch is drawn, as that of the rows."""
        sampling = self.rows.sampling
        return sampling.halved() if sampling is not None and self.paired else sampling

    @property
    def sources(self) -> dict[str, list[int]]:
        """Numbers of the replies by the source of a mixture; empty for other data sets."""
        halves = (0, 1) if self.paired else (0,)
        return {
            name: [len(halves) * int(row) + half for row in rows for half in halves]
            for name, rows in self.rows.sources.items()
        }

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each row's prompt and of its response."""
        prompts = torch.from_numpy(self.rows.lengths("prompt_ids"))
        if not self.paired:
            return prompts.tolist(), self.rows.lengths("completion_ids").tolist()
        responses = pair_response_lengths(self.rows)  # (n,2)
        return prompts.repeat_interleave(2).tolist(), responses.flatten().tolist()


def as_reply(prompt: Mapping[str, Any], response: Mapping[str, Any]) -> Reply:
    """One row's prompt with another's response, or with its own."""
    return prompt["prompt_ids"], response["completion_ids"]


def reply_length(row: Mapping[str, Any]) -> int:
    """Tokens of a row's prompt and response."""
    return len(row["prompt_ids"]) + len(row["completion_ids"])


def matched(numbers: Sequence[int]) -> list[Combination]:
    """Each row's prompt with its own response."""
    return [*zip(numbers, numbers, strict=True)]


def mismatched(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Combination]:
    """Each row's prompt with the response of the next row, going round, that has another prompt;
    with the next one's where all have the same."""
    count = len(rows)
    found = []
    for i, row in enumerate(rows):
        after = [(i + k) % count for k in range(1, count)] or [i]
        other = (j for j in after if rows[j]["prompt_ids"] != row["prompt_ids"])
        found.append((numbers[i], numbers[next(other, after[0])]))
    return found


def needed_combinations(train: LabelledReplies, job: KTOJob, total: int) -> list[Combination]:
    """All combinations whose log-probability `total` steps need, each once, in order.

    Raises:
        DataError: all replies are good, or all are bad.
    """
    needed: set[Combination] = set()
    labels: Counter[bool] = Counter()
    for step in range(total):
        numbers = batch_rows(train, job.batch_size, step, job.seed)
        rows = train.take(numbers)
        needed |= {*matched(numbers), *mismatched(rows, numbers)}
        labels.update(row["label"] for row in rows)
    if len(labels) == 1:
        found, missing = ("good", "bad") if True in labels else ("bad", "good")
        raise DataError(
            f"All {labels.total():,} training replies are {found} (label {found == 'good'}), and "
            f"KTO learns from what tells them from {missing} ones: add {missing} replies, or use "
            "sft for good replies alone."
        )
    return sorted(needed)


def combination_logps(
    module: Policy,
    replies: LabelledReplies,
    combinations: Sequence[Combination],
    strategy: Strategy,
    job: KTOJob,
) -> Logps:
    """Log-probability of each response after its prompt, by all ranks together."""
    prompts, responses = replies.lengths
    lengths = [prompts[p] + responses[r] for p, r in combinations]

    def load(indices: list[int]) -> list[Reply]:
        before = replies.take([combinations[i][0] for i in indices])
        after = replies.take([combinations[i][1] for i in indices])
        return [as_reply(p, r) for p, r in zip(before, after, strict=True)]

    logps = response_logps(module, lengths, load, strategy, job.resources.micro_batch_size)
    return dict(zip(combinations, logps.tolist(), strict=True))


def means_by_label(
    metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The metrics of a global batch with the means of the implicit rewards in place of their sums:
    chosen_reward over the good rows, rejected_reward over the bad ones, each left out where there
    is no such row."""
    good = sum(bool(row["label"]) for row in rows)
    counts = {"chosen_reward": good, "rejected_reward": len(rows) - good}
    return {
        name: value / counts[name] if name in counts else value
        for name, value in metrics.items()
        if counts.get(name) != 0
    }
