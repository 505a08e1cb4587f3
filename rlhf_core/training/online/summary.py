"""The metrics of a rollout, in training or on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_core.jobs import OnlineJob
from rlhf_core.losses.ppo import kl_estimate
from rlhf_core.rollout.variety import openings
from rlhf_core.training.online.experience import Experience, logprob_gap
from rlhf_core.training.online.sampling import GlobalRollout
from rlhf_core.training.online.scores import score_metrics


def summarise(job: OnlineJob, experience: Experience) -> dict[str, float]:
    """Metrics of a rollout. KL in nats per reply, entropy in nats per token, length in tokens; what
    replies have in common in token ids (see `variety`)."""
    replies = experience.rollout.sampled_ids()
    pairs = neighbour_pairs(replies)
    mask = experience.response_mask  # (B,T)
    tokens = mask.sum()
    scored = {
        "score": float(experience.raw_scores.mean()),
        "reward": float(experience.scores.mean()),
    }
    return {
        **(scored if experience.components else {}),  # a judge of pairs gives no scores
        **{f"reward_{name}": float(x.mean()) for name, x in experience.components.items()},
        **experience.component_metrics,
        **score_metrics(job, experience.components, experience.disagreement),
        **{f"failure_{name}": float(n) for name, n in experience.failures.items()},
        **kl_metrics(experience),
        "length": float(tokens / len(mask)),
        "at_limit": at_limit(job, experience),
        "finished": float(experience.rollout.finished.float().mean()),
        "repetition": repetition(pairs),
        "top_opening": openings(replies)[0][1],
        "distinct_2": distinct_2(pairs),
        "entropy": float(-(experience.old_logprobs * mask).sum() / tokens),
        "rollout_logprob_gap": logprob_gap(experience),
        **episode_metrics(experience.rollout),
    }


def kl_metrics(experience: Experience) -> dict[str, float]:
    """The KL to the reference, by two estimates; {} without one."""
    old, ref, mask = experience.old_logprobs, experience.ref_logprobs, experience.response_mask
    if ref is None:
        return {}
    k1, k3 = kl_estimate(old, ref, "k1"), kl_estimate(old, ref, "k3")  # (B,T) each
    found = {"kl": k1, "kl_k3": k3}
    return {name: float((x * mask).sum() / len(mask)) for name, x in found.items()}


def at_limit(job: OnlineJob, experience: Experience) -> float:
    """Share of the replies as long as may be; of the episodes that were cut for their tokens."""
    outcomes = experience.rollout.outcomes
    if outcomes is not None:
        return sum(outcome.at_limit for outcome in outcomes) / len(outcomes)
    long = experience.response_mask.sum(dim=1) >= job.max_new_tokens  # (B,)
    return float(long.float().mean())


def episode_metrics(rollout: GlobalRollout) -> dict[str, float]:
    """Of episodes with an environment: means of turns, of tokens that it wrote, and of what it
    counted, each per episode; none without one."""
    if rollout.outcomes is None:
        return {}
    assert rollout.trained is not None
    count = len(rollout.outcomes)
    names = sorted({name for outcome in rollout.outcomes for name in outcome.counts})
    counted = {
        name: sum(outcome.counts.get(name, 0) for outcome in rollout.outcomes) for name in names
    }
    written = sum(marks.count(False) for marks in rollout.trained)
    return {
        "turns": sum(outcome.turns for outcome in rollout.outcomes) / count,
        "environment_tokens": written / count,
        **{f"environment_{name}": number / count for name, number in counted.items()},
    }


class NeighbourPairs(NamedTuple):
    """The pairs of neighbouring tokens of replies; equal pairs have equal numbers."""

    numbers: list[np.ndarray]  # of each reply, one fewer than it has tokens
    different: int  # pairs, whose numbers are below it


def neighbour_pairs(replies: Sequence[Sequence[int]]) -> NeighbourPairs:
    """Numbers the pairs of replies, lists of token ids. A rollout may have millions of tokens: of
    ten million, a set of tuples takes a gigabyte on each rank."""
    tokens = [np.asarray(reply, dtype=np.int64) for reply in replies]
    keys = [(ids[:-1] << 32) | ids[1:] for ids in tokens]
    found, numbers = np.unique(np.concatenate(keys), return_inverse=True)
    ends = np.cumsum([len(of_reply) for of_reply in keys])
    return NeighbourPairs(np.split(numbers, ends[:-1]), len(found))


def distinct_2(pairs: NeighbourPairs) -> float:
    """Different pairs as a share of all of them (see `variety`); 0 where there are none."""
    count = sum(len(numbers) for numbers in pairs.numbers)
    return pairs.different / count if count else 0.0


def repetition(pairs: NeighbourPairs) -> float:
    """Share of a reply's 4-grams of token ids that came in it before, mean over the replies.

    0 for a reply of less than four tokens; a loop of p tokens in a reply of n has 1 - p / (n - 3).
    """
    shares = []
    for numbers in pairs.numbers:
        grams = np.sort(numbers[:-2] * pairs.different + numbers[2:])  # each has two pairs
        first = np.count_nonzero(np.diff(grams)) + 1  # of those that are the same
        shares.append(1.0 - int(first) / len(grams) if len(grams) else 0.0)
    return sum(shares) / len(shares)
