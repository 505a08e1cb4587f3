"""Labels by a model behind an endpoint (RLAIF, arXiv 2309.00267): it compares every two replies to
a prompt in both orders, or rates each reply by a rubric.

P prompts with n replies each.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.data.rows.conversation import conversation
from rlhf_core.jobs.judging import EndpointJudgeSettings, RubricJudgeSettings
from rlhf_core.jobs.reward_services import JudgeReward
from rlhf_core.judges.endpoint import EndpointJudge
from rlhf_core.rewards.services import Item, Services
from rlhf_core.runtime.distributed import Group

Row = dict[str, Any]
Results = dict[tuple[int, int], float]
"""Positions of two replies to a prompt, the smaller one first -> 1.0 if the first is better, 0.0 if
the second is, 0.5 for a tie."""


class PairJudge:
    """Compares replies. Every rank asks about its share of the prompts.

    Attributes:
        counts: of all comparisons on this rank so far: requests, tokens, and `EndpointJudge.counts`
            without the sides.
    """

    def __init__(self, settings: EndpointJudgeSettings, group: Group) -> None:
        self._group, self._gather = group, group.gather_beside()
        share = max(1, settings.parallel // group.size)
        self._judge = EndpointJudge(settings.model_copy(update={"parallel": share}))
        self.counts: Counter[str] = Counter()

    def compare(self, rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> list[Results]:
        """Compare every two replies. Every rank calls.

        Args:
            rows: P of the prompts. texts: P lists of n replies.

        Returns:
            P, on every rank.
        """
        mine = range(self._group.rank, len(rows), self._group.size)
        asked = [
            (i, pair) for i in mine for pair in itertools.combinations(range(len(texts[i])), 2)
        ]
        prompts = [conversation(json.loads(rows[i]["prompt"])) for i, _ in asked]
        found = self._judge.compare(
            prompts, [texts[i][a] for i, (a, _) in asked], [texts[i][b] for i, (_, b) in asked]
        )
        judge = self._judge
        self.counts.update({"requests": judge.requests, "tokens": judge.tokens, **judge.counts})
        own: dict[int, Results] = {i: {} for i in mine}
        for (i, pair), result in zip(asked, found, strict=True):
            own[i][pair] = result
        whole = {i: results for part in self._gather(own) for i, results in part.items()}
        return [whole[i] for i in range(len(rows))]

    def totals(self) -> dict[str, int]:
        """The counts of all ranks. Every rank calls."""
        total = sum(self._gather(self.counts), Counter())
        return {name: total[name] for name in (
            "requests", "tokens", "pairs", "agreed", "by_position", "half", "identical", "unclear"
        )}  # fmt: skip


def better_and_worse(
    results: Results, n: int, *, best_worst: bool
) -> tuple[list[tuple[int, int]], int]:
    """Which replies to a prompt become pairs.

    Args:
        best_worst: only the reply with the most wins against the one with the fewest (of equals the
            first, and the last), if the judge prefers it; else every two that it tells apart.

    Returns:
        (better, worse) positions, and how many comparisons were ties.
    """
    pairs = list(results)
    if best_worst:
        wins = [0.0] * n
        for (a, b), result in results.items():
            wins[a] += result
            wins[b] += 1.0 - result
        best = max(range(n), key=lambda j: wins[j])
        worst = min(reversed(range(n)), key=lambda j: wins[j])
        pair = (min(best, worst), max(best, worst))
        won = best != worst and results[pair] == float(best < worst)
        return ([(best, worst)], 0) if won else ([], 1)
    kept = [(a, b) if results[a, b] == 1.0 else (b, a) for a, b in pairs if results[a, b] != 0.5]
    return kept, len(pairs) - len(kept)


class RubricJudge:
    """Rates replies. Every rank asks about its share; a stage that is started again on this machine
    does not ask again.

    Args:
        folder: for the answers.
    """

    def __init__(self, settings: RubricJudgeSettings, group: Group, folder: Path) -> None:
        self._group, self._gather = group, group.gather_beside()
        reward = JudgeReward(**settings.model_dump(exclude={"type"}))
        self.services = Services([reward], folder, group.rank, group.size)
        self.counts: Counter[str] = Counter()

    def rate(
        self, rows: Sequence[Row], texts: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        """Scores of replies, 0 to 1, on every rank.

        Args:
            rows, texts, finished: of each reply.
        """
        mine = range(self._group.rank, len(rows), self._group.size)
        items = [Item(json.loads(rows[i]["prompt"]), texts[i], finished[i], rows[i]) for i in mine]
        (own,) = self.services.answers(items)
        found = {
            i: a
            for part in self._gather(dict(zip(mine, own, strict=True)))
            for i, a in part.items()
        }
        answers = [found[i] for i in range(len(rows))]
        self.services.check([answers])
        self.counts["replies"] += len(answers)
        self.counts["tokens"] += int(sum(answer.components["tokens"] for answer in answers))
        self.counts["unclear"] += sum(bool(answer.failure) for answer in answers)
        return [answer.score for answer in answers]

    def totals(self) -> dict[str, int]:
        """The counts, which every rank has whole."""
        return dict(self.counts)

    def close(self) -> None:
        """Send no further request."""
        self.services.close()
