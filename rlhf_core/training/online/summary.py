"""The metrics of a rollout, in training or on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.jobs import OnlineJob
from rlhf_core.losses.ppo import kl_estimate
from rlhf_core.rollout.variety import distinct_2, openings
from rlhf_core.training.online.experience import Experience, logprob_gap
from rlhf_core.training.online.sampling import GlobalRollout
from rlhf_core.training.online.scores import score_metrics

GRAM = 4  # tokens of the n-grams that `repetition` counts


def summarise(job: OnlineJob, experience: Experience) -> dict[str, float]:
    """Metrics of a rollout. KL in nats per reply, entropy in nats per token, length in tokens; what
    replies have in common in token ids (see `variety`)."""
    replies = experience.rollout.sampled_ids()
    mask = experience.response_mask  # (B,T)
    k1 = kl_estimate(experience.old_logprobs, experience.ref_logprobs, "k1")  # (B,T)
    k3 = kl_estimate(experience.old_logprobs, experience.ref_logprobs, "k3")  # (B,T)
    tokens = mask.sum()
    return {
        "score": float(experience.raw_scores.mean()),
        "reward": float(experience.scores.mean()),
        **{f"reward_{name}": float(x.mean()) for name, x in experience.components.items()},
        **experience.component_metrics,
        **score_metrics(job, experience.components, experience.disagreement),
        **{f"failure_{name}": float(n) for name, n in experience.failures.items()},
        "kl": float((k1 * mask).sum() / len(mask)),
        "kl_k3": float((k3 * mask).sum() / len(mask)),
        "length": float(tokens / len(mask)),
        "at_limit": at_limit(job, experience),
        "finished": float(experience.rollout.finished.float().mean()),
        "repetition": repetition(replies),
        "top_opening": openings(replies)[0][1],
        "distinct_2": distinct_2(replies),
        "entropy": float(-(experience.old_logprobs * mask).sum() / tokens),
        "rollout_logprob_gap": logprob_gap(experience),
        **episode_metrics(experience.rollout),
    }


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


def repetition(replies: Sequence[Sequence[int]]) -> float:
    """Share of a reply's 4-grams of token ids that came in it before, mean over the replies.

    0 for a reply of less than four tokens; a loop of p tokens in a reply of n has 1 - p / (n - 3).
    """
    shares = []
    for reply in replies:
        grams = list(zip(*(reply[i:] for i in range(GRAM)), strict=False))
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)
