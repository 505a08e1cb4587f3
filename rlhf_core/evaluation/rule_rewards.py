"""The rules and services among a job's rewards, on the replies of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_core.errors import DataError
from rlhf_core.jobs import ModelReward
from rlhf_core.jobs.reward_services import SERVICES
from rlhf_core.jobs.rewards import VERIFIERS, EnvironmentReward, Reward
from rlhf_core.rewards import Rules
from rlhf_core.rewards.services import Item, Services
from rlhf_core.rollout.replies import Reply

ANSWERS = "answers"
"""Name of a verifier's score: how many of the answers are right, at weight 1."""


class RuleRewards:
    """Scores replies with the rewards of the last stage of online RL, as they stand: not clipped or
    whitened, and without the penalty for cut replies.

    Args:
        rewards: of that stage. seed: see `Rules`. log: takes a sentence for people.
    """

    def __init__(self, rewards: Sequence[Reward], seed: int, log: Callable[[str], None]) -> None:
        self.rules = Rules(rewards, seed)
        self.services = Services(rewards)
        self.of_model = sum(r.weight for r in rewards if isinstance(r, ModelReward))
        rules = [
            r for r in rewards if not isinstance(r, (ModelReward, EnvironmentReward, *SERVICES))
        ]
        self.verifier = next((i for i, r in enumerate(rules) if isinstance(r, VERIFIERS)), None)
        self.log = log

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        texts: Sequence[str],
        replies: Sequence[Reply],
        scores: Sequence[float],
    ) -> dict[str, list[float]]:
        """The weighted sum of all rewards as `reward`, and a verifier's score as `answers`.

        Args:
            rows: of the held-out prompts. texts, replies: to them.
            scores: of the reward model; empty without one.

        Returns:
            No rewards if a held-out prompt lacks what a rule needs, which is logged.
        """
        prompts = [json.loads(row["prompt"]) for row in rows]
        finished = [reply.finished for reply in replies]
        try:
            found = self.rules.score(
                prompts, list(texts), list(rows), finished, [len(reply.ids) for reply in replies]
            )
            answers = self.services.answers(
                [Item(*of) for of in zip(prompts, texts, finished, rows, strict=True)]
            )
        except DataError as error:
            self.log(f"the held-out replies have no reward: {error}")
            return {"reward": []}
        self.services.check(answers)
        scores_of = [*found, *([answer.score for answer in of] for of in answers)]
        weights = [*self.rules.weights, *self.services.weights]
        sums = [self.of_model * score for score in scores] or [0.0] * len(texts)
        for weight, of_reward in zip(weights, scores_of, strict=True):
            sums = [total + weight * score for total, score in zip(sums, of_reward, strict=True)]
        right = {} if self.verifier is None else {ANSWERS: found[self.verifier]}
        return {"reward": sums, **right}
