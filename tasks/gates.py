"""Gates: bounds that a new model must keep before it is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_core.jobs import Gates


def judge(
    gates: Gates, evaluation: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Every gate with its number.

    Args:
        evaluation: evaluation.json of base, SFT and new model.
        comparison: the same with the published model in the place of "sft"; None without one.

    Returns:
        failed: names of the gates that were not passed; text: one line; markdown: a table.
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
        text = f"not promoted: {first[0]} is {_shown(first[1])}, needed is {first[2]}"
    else:
        text = f"promoted: {len(rows)} of {len(rows)} gates passed"
    return {"failed": failed, "text": text, "markdown": "\n".join(lines)}


Row = tuple[str, float | None, str, bool]


def _checks(
    gates: Gates, evaluation: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> Iterator[Row]:
    accuracy = (evaluation.get("reward_model") or {}).get("accuracy")
    yield _at_least("min_reward_accuracy", accuracy, gates.min_reward_accuracy)
    new = (evaluation.get("models") or {}).get("policy") or {}
    kl = new.get("kl_mean")
    yield "max_kl", kl, f"at most {gates.max_kl:g}", kl is not None and kl <= gates.max_kl
    rates = (comparison or evaluation).get("win_rate") or {}
    judged_by = "gold" if "gold" in rates else "reward"
    rate = (rates.get(judged_by) or {}).get("rate")
    yield _at_least(f"min_win_rate ({judged_by})", rate, gates.min_win_rate)


def _at_least(name: str, found: float | None, bound: float) -> Row:
    return name, found, f"at least {bound:g}", found is not None and found >= bound


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
