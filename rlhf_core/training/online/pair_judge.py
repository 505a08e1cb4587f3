"""A judge behind an endpoint says which reply to a prompt is better (OAIF, arXiv 2402.04792,
section 3.3); it is asked in both orders, and a reply wins only if it wins both times.

B replies of a rollout (global); replies 2 i and 2 i + 1 answer prompt i.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import torch

from rlhf_core.data.rows.conversation import conversation
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.judges.endpoint import EndpointJudge
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.online.experience import Experience
from rlhf_core.training.online.sampling import GlobalRollout

COUNTS = ("agreed", "by_position", "half", "identical", "unclear")


class PairJudge:
    """Compares the replies of rollouts. Rank 0 asks about all pairs, so that `parallel` and
    `max_unclear` mean the same on any number of ranks. Every rank makes one.

    Args:
        tokenizer: on rank 0.

    Raises:
        ConfigError: the environment variable with the key is not set (rank 0).
    """

    def __init__(self, settings: EndpointJudgeSettings, group: Group, tokenizer: Any) -> None:
        self._tokenizer, self._gather = tokenizer, group.gather_beside()
        self._judge = EndpointJudge(settings, spare=1) if group.rank == 0 else None

    def compare(self, experience: Experience) -> tuple[Experience, dict[str, float]]:
        """Ask about each pair. Every rank calls.

        Returns:
            - The experience with 1 as the score of a reply that won, 0 of one that lost, and 0.5 of
              both replies of a tie.
            - Metrics of the rollout: requests, what ties were, unclear answers (counts); tokens of
              questions and answers per pair, where the endpoint tells; seconds.

        Raises:
            JudgeError: the endpoint rejected a request or kept failing, or too many answers had no
                verdict.
        """
        asked = None if self._judge is None else self._ask(self._judge, experience.rollout)
        results, metrics = self._gather(asked)[0]
        first = torch.tensor(results)  # (B/2,)
        scores = torch.stack([first, 1.0 - first], dim=1).flatten()  # (B,)
        return replace(experience, raw_scores=scores, scores=scores), metrics

    def _ask(
        self, judge: EndpointJudge, rollout: GlobalRollout
    ) -> tuple[list[float], dict[str, float]]:
        """Each pair's result for its first reply, and the metrics."""
        began = time.perf_counter()
        prompts = [conversation(json.loads(row["prompt"])) for row in rollout.rows[::2]]
        texts = [
            self._tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.sampled_ids()
        ]
        results = judge.compare(prompts, texts[::2], texts[1::2])
        metrics = {f"judge_{name}": float(judge.counts[name]) for name in COUNTS}
        metrics["judge_requests"] = float(judge.requests)
        metrics["judge_tokens_per_pair"] = judge.tokens / len(results)
        metrics["judge_seconds"] = time.perf_counter() - began
        return results, metrics
