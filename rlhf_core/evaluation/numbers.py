"""The numbers of an evaluation: of each model, and the differences between two of them.

evaluation.json:
    models       base, sft, policy -> means and errors (reward, answers, gold, kl; disagreement
                 of several reward models), shares, n
    greedy       models: the same of greedy replies to the first n prompts, without KL and entropy
    questions    models: model -> right answers to n general questions: rate, low, high
    heldout      model -> loss (nats per token), perplexity; sources: its loss on each source of a
                 mixture
    differences  policy minus start: mean, low, high (95 %, paired bootstrap), n; greedy_...: of
                 the greedy replies
    gold_gain    the same of the gold score: mean, se
    win_rate     judge -> rate, low, high, n of the policy against start, and length_controlled
    sampling     temperature, max_new_tokens, seed, n, greedy: how the replies were made
    reward_model accuracy on held-out pairs; of an ensemble its first member's, and their number
    judge        counts of the judge behind an endpoint
    contamination  prompts, questions -> training data set -> how much of them its rows have
                 (rlhf_core/data/overlap/result.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rlhf_core.evaluation.intervals import difference
from rlhf_core.evaluation.length_control import controlled_win_rate
from rlhf_core.evaluation.measure import Measured
from rlhf_core.evaluation.scored import Columns, Scored
from rlhf_core.evaluation.self_bleu import self_bleu
from rlhf_core.evaluation.statistics import mean, rate, spread, standard_error, wins
from rlhf_core.jobs import EvaluateJob
from rlhf_core.rollout.variety import variety

SCORES = ("reward", "answers", "gold")


def of_model(replies: Scored) -> dict[str, Any]:
    """The report's numbers of one model."""
    known = replies.columns
    spreads = [
        spread(name, known[name]) for name in (*SCORES, "disagreement", "kl") if name in known
    ]
    flags = ("finished", "language_changes", "refusals")
    return {
        **{key: value for found in spreads for key, value in found.items()},
        "length_mean": mean(known["length"]),
        **{name: mean(known[name]) for name in flags},
        **variety(replies.texts),
        "self_bleu": self_bleu(replies.texts),
        "n": len(replies.texts),
    }


def entropy(known: Columns) -> float:
    """Entropy of the sampled distribution in nats per token: the mean of -log p over the tokens of
    the model's own samples, which estimates it without bias."""
    return sum(known["surprise"]) / sum(known["length"])


def of_heldout(found: Measured, sources: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Held-out loss in nats per token, that of each source of a mixture, and perplexity.

    Args:
        sources: name -> numbers of its rows; empty for other data sets.
    """
    loss = sum(found.losses) / sum(found.tokens)
    result: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if sources:
        result["sources"] = {
            name: sum(found.losses[i] for i in rows) / sum(found.tokens[i] for i in rows)
            for name, rows in sources.items()
            if len(rows)
        }
    return result


def differences(policy: Scored, start: Scored, seed: int) -> dict[str, Any]:
    """What changed from the start model to the policy, with paired intervals."""
    ours, theirs = policy.columns, start.columns
    found = {
        name: difference(ours[name], theirs[name], seed)
        for name in ours
        if name in theirs and name != "surprise"
    }
    tokens = ours["length"], theirs["length"]
    found["entropy"] = difference(ours["surprise"], theirs["surprise"], seed, tokens)
    new, old = policy.measured, start.measured
    if new.losses:
        found["loss"] = difference(new.losses, old.losses, seed, (new.tokens, old.tokens))
    return found


def greedy_differences(policy: Scored, start: Scored, seed: int) -> dict[str, Any]:
    """What changed in the scores of the greedy replies."""
    ours, theirs = policy.columns, start.columns
    return {
        f"greedy_{name}": difference(ours[name], theirs[name], seed)
        for name in SCORES
        if name in ours and name in theirs
    }


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
    sampled: Mapping[str, Scored],
    greedy: Mapping[str, Scored],
    start: str,
    sources: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, Any]:
    """evaluation.json, without general questions and what other judges say.

    Args:
        greedy: empty without greedy replies.
        sources: see `of_heldout`.
    """
    policy, reference = sampled["policy"], sampled[start]
    ours, theirs = policy.columns, reference.columns
    result: dict[str, Any] = {
        "models": {
            name: of_model(replies) | {"entropy": entropy(replies.columns)}
            for name, replies in sampled.items()
        },
        "heldout": {
            name: of_heldout(replies.measured, sources)
            for name, replies in sampled.items()
            if replies.measured.losses
        },
        "differences": differences(policy, reference, job.seed),
        "win_rate": {
            name: beside(wins(ours[name], theirs[name]), policy.texts, reference.texts, job.seed)
            for name in ("reward", "gold")
            if name in ours
        },
        "reward_model": {},
        "sampling": {
            "temperature": job.temperature,
            "max_new_tokens": job.max_new_tokens,
            "seed": job.seed,
            "n": len(policy.texts),
            "greedy": 0,
        },
    }
    if greedy:
        result["greedy"] = {"models": {name: of_model(replies) for name, replies in greedy.items()}}
        result["differences"] |= greedy_differences(greedy["policy"], greedy[start], job.seed)
        result["sampling"]["greedy"] = len(greedy["policy"].texts)
    if "gold" in ours:
        gains = [a - b for a, b in zip(ours["gold"], theirs["gold"], strict=True)]
        result["gold_gain"] = {"mean": mean(gains), "se": standard_error(gains)}
    return result


def marked(
    right: Mapping[str, Sequence[bool]], start: str, seed: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """General questions: each model's rate with its interval (Wilson), and the difference.

    Args:
        right: model -> whether it answered each question right.
    """
    values = {name: [float(one) for one in found] for name, found in right.items()}
    change = difference(values["policy"], values[start], seed)
    return {"models": {name: rate(found) for name, found in values.items()}}, change
