"""Gates: bounds on metrics that decide whether a run continues, or a model is published.

The settings of a stage have its gates (`check_...`): if one fails, the run ends. A retraining has
gates of its own (`judge`): if one fails, the model is kept as a candidate. Bounds apply to the
point estimate, which does not depend on the number of held-out rows as the end of an interval does;
the interval is shown beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_core.jobs import EvaluateSettings, Gates, OnlineSettings, RewardSettings, job_class


def check_reward(settings: RewardSettings, metrics: Mapping[str, Any]) -> str | None:
    """What is wrong with a reward model; None when it passes.

    Args:
        metrics: those of its artifact.
    """
    bound = settings.min_heldout_accuracy
    if bound is None:
        return None
    found = metrics.get("heldout") or {}
    accuracy = found.get("accuracy")
    if accuracy is None:
        return (
            f"reward.min_heldout_accuracy is {bound:g}, but no accuracy was measured: the "
            "preference data has no held-out pairs. Raise data.preference.heldout_fraction (or "
            "max_heldout_prompts, where pairs are sampled), or clear the gate."
        )
    if accuracy >= bound:
        return None
    baselines = found.get("baselines") or {}
    trivial = [row["accuracy"] for row in baselines.values() if "accuracy" in (row or {})]
    beside = f"; a trivial judge reaches {max(trivial):.3g}" if trivial else ""
    return (
        f"The reward model's accuracy on {found.get('n', '?')} held-out pairs is {accuracy:.3g}"
        f"{_interval(found)}, expected at least {bound:g} (reward.min_heldout_accuracy){beside}. "
        "What usually helps: more pairs, or clearer ones (data.preference.min_margin); with few "
        "pairs, reward.head=probe and reward.pooling=mean; if the training accuracy is low too, a "
        "larger learning rate. The reward model is kept in the store: with a lower bound the run "
        "continues from it."
    )


def check_evaluation(
    settings: EvaluateSettings,
    evaluation: Mapping[str, Any],
    stage: str,
    comparison: Mapping[str, Any] | None = None,
) -> str | None:
    """What is wrong with the final model, one sentence for each gate; None when it passes.

    Args:
        evaluation: evaluation.json.
        stage: the algorithm that made the model, whose settings the advice is about.
        comparison: evaluation.json in which the champion takes the place of the start model.
    """
    found = [_win_rate(settings.min_win_rate, evaluation, stage, comparison)]
    found += [_length(settings.max_length_ratio, evaluation, stage)]
    wrong = [text for text in found if text]
    if not wrong:
        return None
    return " ".join(
        [*wrong, "The model is kept in the store; with other bounds the run continues."]
    )


def _drift_settings(stage: str) -> tuple[str, str]:
    """Settings that let a stage's model drift further from its start, and that hold it back."""
    fields = job_class(stage).model_fields
    for name in ("kl_coef", "beta"):
        if name in fields and stage != "simpo":  # its beta is a scale; it has no reference model
            return f"a lower {stage}.{name}", f"a higher {stage}.{name}"
    return f"a higher {stage}.learning_rate", f"a lower {stage}.learning_rate"


def _win_rate(
    bound: float | None,
    evaluation: Mapping[str, Any],
    stage: str,
    comparison: Mapping[str, Any] | None,
) -> str | None:
    if bound is None:
        return None
    judged_by, rate = judged(comparison or evaluation)
    against = " against the champion" if comparison else ""
    value = rate.get("rate")
    if value is None:
        return (
            f"evaluate.min_win_rate is {bound:g}, but no win rate was measured: set evaluate.judge "
            "or train a reward model, or clear the gate."
        )
    if value >= bound:
        return None
    freer, tighter = _drift_settings(stage)
    learned_from = (
        "a reward model of higher accuracy" if _online(stage) else "more or clearer pairs"
    )
    return (
        f"The model's replies win{against} on {value:.3g} of {rate.get('n', '?')} prompts"
        f"{_interval(rate)} as judged by {judged_by}, expected at least {bound:g} "
        f"(evaluate.min_win_rate). What usually helps: more steps, {freer}, {learned_from}; if the "
        f"reward rose but another judge disagrees, fewer steps or {tighter}. With more "
        "evaluate.max_prompts the estimate is more certain."
    )


def _length(bound: float | None, evaluation: Mapping[str, Any], stage: str) -> str | None:
    if bound is None:
        return None
    models = evaluation.get("models") or {}
    before = (models.get("sft") or models.get("base") or {}).get("length_mean")
    after = _policy(models).get("length_mean")
    if before is None or after is None:
        return (
            f"evaluate.max_length_ratio is {bound:g}, but no lengths were measured; clear the gate."
        )
    if after <= bound * before:
        return None
    tighter = _drift_settings(stage)[1]
    more = f" or {stage}.missing_eos_penalty" if _online(stage) else ""
    ratio = f"{after / before:.3g} times" if before else "not to be compared with"
    return (
        f"The model's replies have {after:.4g} tokens, {ratio} the {before:.4g} of the model it "
        f"started from; expected at most {bound:g} times (evaluate.max_length_ratio). Longer "
        "replies are the most common way to exploit a reward model. What usually helps: pairs in "
        "which the longer reply is not usually the better one (see the baseline of the reward "
        f"model's accuracy), {tighter}{more}, fewer steps."
    )


def _online(stage: str) -> bool:
    return issubclass(job_class(stage), OnlineSettings)


def judge(
    gates: Gates, evaluation: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Check every gate of a retraining.

    Args:
        evaluation: evaluation.json of base, SFT and new model.
        comparison: evaluation.json with the published model in the place of "sft"; None without
            a published model.

    Returns:
        failed: names of the failed gates; text: one line; markdown: a table.
    """
    rows = list(_checks(gates, evaluation, comparison))
    failed = [name for name, *_, passed in rows if not passed]
    against = "the published model" if comparison is not None else "the SFT model (none published)"
    lines = [f"Compared with {against}.", ""]
    lines += ["| gate | found | needed | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {_shown(found)} | {needed} | {'passed' if passed else '**failed**'} |"
        for name, found, needed, passed in rows
    ]
    if failed:
        first = next(row for row in rows if row[0] == failed[0])
        text = f"not promoted: {first[0]} is {_shown(first[1])}, expected {first[2]}"
    else:
        text = f"promoted: {len(rows)} of {len(rows)} gates passed"
    return {"failed": failed, "text": text, "markdown": "\n".join(lines)}


Row = tuple[str, float | None, str, bool]


def _checks(
    gates: Gates, evaluation: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> Iterator[Row]:
    accuracy = (evaluation.get("reward_model") or {}).get("accuracy")
    yield _at_least("min_reward_accuracy", accuracy, gates.min_reward_accuracy)
    new = _policy(evaluation.get("models") or {})
    kl = new.get("kl_mean")
    yield "max_kl", kl, f"at most {gates.max_kl:g}", kl is not None and kl <= gates.max_kl
    judged_by, rate = judged(comparison or evaluation)
    yield _at_least(f"min_win_rate ({judged_by})", rate.get("rate"), gates.min_win_rate)


def judged(evaluation: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and win rate of the judge that had least to do with the training: a model at an
    endpoint, else the gold judge, else the reward model. Gates and tables go by it."""
    rates = evaluation.get("win_rate") or {}
    judged_by = next((name for name in ("judge", "gold") if name in rates), "reward")
    return judged_by, rates.get(judged_by) or {}


def _policy(models: Mapping[str, Any]) -> Mapping[str, Any]:
    """The final model; older evaluations called it ppo."""
    return models.get("policy") or models.get("ppo") or {}


def _interval(found: Mapping[str, Any]) -> str:
    if "low" not in found or "high" not in found:
        return ""
    return f" (95 % interval {found['low']:.3g} to {found['high']:.3g})"


def _at_least(name: str, found: float | None, bound: float) -> Row:
    return name, found, f"at least {bound:g}", found is not None and found >= bound


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
