"""What the report shows of a rollout: sample replies, metrics, repetition."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_core.jobs import OnlineJob
from rlhf_core.losses.ppo import kl_estimate
from rlhf_core.training.online.experience import Experience, logprob_gap

SHOWN = 4  # replies of each rollout that are kept for people to look at


GRAM = 4  # tokens of the pieces that `repetition` counts


def some_samples(tokenizer: Any, experience: Experience) -> list[dict[str, Any]]:
    """The first replies of a rollout as text."""
    found = []
    for row in range(min(SHOWN, len(experience.sequences))):
        ids, start = experience.sequences[row], experience.prompt_lengths[row]
        prompt, reply = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:])
        )
        score = round(float(experience.raw_scores[row]), 4)
        found.append({"prompt": prompt, "reply": reply, "score": score})
    return found


def inspect(experience: Experience) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A rollout for a person: rows of token ids, and tensors with one row for each."""
    rows = [
        {"input_ids": sequence, "prompt_length": length}
        for sequence, length in zip(experience.sequences, experience.prompt_lengths, strict=True)
    ]
    whole = vars(experience) | {f"reward_{k}": v for k, v in experience.components.items()}
    return rows, {name: value for name, value in whole.items() if isinstance(value, Tensor)}


def summarise(job: OnlineJob, experience: Experience) -> dict[str, float]:
    """Metrics of a rollout. KL in nats per reply, entropy in nats per token, length in tokens."""
    mask = experience.mask
    k1 = kl_estimate(experience.old_logprobs, experience.ref_logprobs, "k1")
    k3 = kl_estimate(experience.old_logprobs, experience.ref_logprobs, "k3")
    tokens = mask.sum()
    return {
        "score": float(experience.raw_scores.mean()),
        "reward": float(experience.scores.mean()),
        **{f"reward_{name}": float(x.mean()) for name, x in experience.components.items()},
        **{f"failure_{name}": float(n) for name, n in experience.failures.items()},
        "kl": float((k1 * mask).sum() / len(mask)),
        "kl_k3": float((k3 * mask).sum() / len(mask)),
        "length": float(tokens / len(mask)),
        "at_limit": float((mask.sum(dim=1) >= job.max_new_tokens).float().mean()),
        "finished": float(experience.finished.float().mean()),
        "repetition": repetition(experience),
        "entropy": float(-(experience.old_logprobs * mask).sum() / tokens),
        "rollout_logprob_gap": logprob_gap(experience),
    }


def repetition(experience: Experience) -> float:
    """Share of a reply's 4-grams of token ids that stood in it before, mean over the replies.

    0 for a reply of less than four tokens; a loop of p tokens in a reply of n has 1 - p / (n - 3).
    """
    shares = []
    for sequence, start in zip(experience.sequences, experience.prompt_lengths, strict=True):
        reply = sequence[start:]
        grams = list(zip(*(reply[i:] for i in range(GRAM)), strict=False))
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)
