"""The numbers of an evaluation: of each model, and the differences between two of them.

evaluation.json:
    models       base, sft, policy -> means and standard errors (reward, gold, kl; disagreement of
                 several reward models), shares, n
    heldout      model -> loss (nats per token), perplexity
    differences  policy minus start: mean, low, high (95 %, paired bootstrap), n
    gold_gain    the same of the gold score: mean, se
    win_rate     judge -> rate, low, high, n of the policy against start, and length_controlled
    sampling     temperature, max_new_tokens, seed, n: how the replies were made
    reward_model accuracy on held-out pairs; of an ensemble its first member's, and their number
    judge        counts of the judge behind an endpoint
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.evaluation.behaviour import changes_language, refuses
from rlhf_core.evaluation.intervals import difference
from rlhf_core.evaluation.length_control import controlled_win_rate
from rlhf_core.evaluation.measure import Measured
from rlhf_core.evaluation.self_bleu import self_bleu
from rlhf_core.evaluation.statistics import mean, rate, spread, standard_error, wins
from rlhf_core.jobs import EvaluateJob
from rlhf_core.rollout.variety import variety

Columns = Mapping[str, Sequence[float]]
"""Name of a number -> its value for each prompt."""


SPREADS = ("reward", "disagreement", "gold", "kl")
"""Numbers that are reported with their standard error."""


def columns(
    found: Measured, gold: Sequence[float], prompts: Sequence[str], texts: Sequence[str]
) -> dict[str, Sequence[float]]:
    """What is known of each reply of a model.

    Args:
        gold: the judge's scores; empty without a judge.
    """
    pairs = list(zip(prompts, texts, strict=True))
    known: dict[str, Sequence[float]] = {
        "reward": found.rewards,
        "disagreement": found.disagreement,
        "gold": gold,
        "kl": found.kl,
        "length": [float(len(reply.ids)) for reply in found.replies],
        "surprise": [-reply.logprob for reply in found.replies],
        "finished": [float(reply.finished) for reply in found.replies],
        "language_changes": [float(changes_language(*pair)) for pair in pairs],
        "refusals": [float(refuses(text)) for text in texts],
    }
    return {name: values for name, values in known.items() if len(values)}


def of_model(known: Columns, texts: Sequence[str]) -> dict[str, Any]:
    """The report's numbers of one model.

    entropy is that of the sampled distribution in nats per token: the mean of -log p over the
    tokens of the model's own samples, an unbiased estimate over sequences.
    """
    spreads = [spread(name, known[name]) for name in SPREADS if name in known]
    flags = ("finished", "language_changes", "refusals")
    return {
        **{key: value for found in spreads for key, value in found.items()},
        "length_mean": mean(known["length"]),
        "entropy": sum(known["surprise"]) / sum(known["length"]),
        **{name: mean(known[name]) for name in flags},
        **variety(texts),
        "self_bleu": self_bleu(texts),
        "n": len(texts),
    }


def of_heldout(found: Measured) -> dict[str, float]:
    """Held-out loss in nats per token, and perplexity."""
    loss = sum(found.losses) / sum(found.tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def differences(
    policy: Columns, start: Columns, heldout: tuple[Measured, Measured], seed: int
) -> dict[str, Any]:
    """What changed from the start model to the policy, with paired intervals.

    Args:
        heldout: policy and start, for the loss of held-out rows.
    """
    found = {
        name: difference(policy[name], start[name], seed)
        for name in policy
        if name in start and name != "surprise"
    }
    tokens = policy["length"], start["length"]
    found["entropy"] = difference(policy["surprise"], start["surprise"], seed, tokens)
    ours, theirs = heldout
    if ours.losses:
        tokens = ours.tokens, theirs.tokens
        found["loss"] = difference(ours.losses, theirs.losses, seed, tokens)
    return found


def beside(
    won: Sequence[float], ours: Sequence[str], theirs: Sequence[str], seed: int
) -> dict[str, Any]:
    """A judge's win rate with its interval, and the length-controlled one.

    Args:
        won: for each prompt 1 ours, 0 theirs, 0.5 a tie. ours, theirs: the replies.
    """
    lengths = [float(len(text)) for text in ours], [float(len(text)) for text in theirs]
    return {**rate(won), "length_controlled": controlled_win_rate(won, *lengths, seed)}


def numbers(
    job: EvaluateJob,
    found: Mapping[str, Measured],
    gold: Mapping[str, Sequence[float]],
    prompts: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    start: str,
) -> dict[str, Any]:
    """evaluation.json, without what other judges say.

    Args:
        gold: the judge's scores by model; empty without a judge.
    """
    known = {
        name: columns(m, gold.get(name, ()), prompts, texts[name]) for name, m in found.items()
    }
    policy, reference = known["policy"], known[start]
    result: dict[str, Any] = {
        "models": {name: of_model(known[name], texts[name]) for name in found},
        "heldout": {name: of_heldout(m) for name, m in found.items() if m.losses},
        "differences": differences(policy, reference, (found["policy"], found[start]), job.seed),
        "win_rate": {
            name: beside(
                wins(policy[name], reference[name]), texts["policy"], texts[start], job.seed
            )
            for name in ("reward", "gold")
            if name in policy
        },
        "reward_model": {},
        "sampling": {
            "temperature": job.temperature,
            "max_new_tokens": job.max_new_tokens,
            "seed": job.seed,
            "n": len(prompts),
        },
    }
    if "gold" in policy:
        gains = [a - b for a, b in zip(policy["gold"], reference["gold"], strict=True)]
        result["gold_gain"] = {"mean": mean(gains), "se": standard_error(gains)}
    return result
