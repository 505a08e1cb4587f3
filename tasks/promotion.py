"""Promotion: whether a model becomes the champion of its name.

A gate (gates.py) bounds one number and ends the run. A model that passes the gates is a version of
its name; what its evaluation shows decides whether it is also the live one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.store import registry
from tasks.gates import judged
from tasks.publish import champion
from tasks.reporting.evaluation import comparison_of, evaluation_of
from tasks.reporting.verdict import Verdict
from tasks.run import Run

NEVER = ("worse", "reward hacked")
WINS = ("better", "better at a price")


@dataclass(frozen=True)
class Promotion:
    """What was decided.

    Attributes:
        reason: for the version's history.
    """

    promoted: bool
    reason: str


def promotion_of(run: Run) -> Promotion:
    """Whether the evaluated model of a run becomes the champion of `publish.name`."""
    settings = run.config.publish
    if settings.promote == "always":
        return Promotion(True, "publish.promote is always")
    if run.decision.get("decision") == "approve":  # the person has read the report
        return Promotion(True, run.decision.get("reason") or "approved by a person")
    if champion(run) == run.artifacts_by_role["model"]:
        return Promotion(True, "the champion's weights")
    if why := refusal(run):
        return Promotion(False, why)
    if registry.champion(run.store, settings.name) is None:
        return Promotion(True, "the first champion")
    compared = comparison_of(run)
    if compared is None:
        return Promotion(
            False,
            "it was not compared with the champion; evaluate.against_champion=true compares them, "
            "and the same run reuses every other stage",
        )
    bound = run.config.evaluate.min_win_rate
    return against_champion(compared.conclusion(), bound, judged(compared.data)[1].get("rate"))


def refusal(run: Run) -> str | None:
    """Why the model must not become champion, whatever its win rate; None if nothing speaks
    against it."""
    compared = comparison_of(run)
    for evaluation, than in (
        (evaluation_of(run, run.stages["evaluate"].digest), ""),
        (compared, " against the champion"),
    ):
        shown = evaluation.conclusion() if evaluation else None
        if shown is not None and shown.state in NEVER:
            return f'the verdict{than} is "{shown.state}". {shown.text}'
    return None


def against_champion(
    verdict: Verdict | None, min_win_rate: float | None, win_rate: float | None
) -> Promotion:
    """Whether a model takes the place of a champion.

    Args:
        verdict: on the comparison with it. win_rate: against it, see `gates.judged`.
        min_win_rate: a bound of the user, who accepts that judge.
    """
    if verdict is not None and verdict.state in WINS:
        return Promotion(True, f"against the champion: {verdict.state}")
    if min_win_rate is not None and win_rate is not None and win_rate >= min_win_rate:
        return Promotion(
            True, f"its win rate against the champion is {win_rate:.3g}, at least "
            f"{min_win_rate:g} (evaluate.min_win_rate)",
        )  # fmt: skip
    text = verdict.text if verdict else "The comparison has no numbers."
    return Promotion(False, f"no gain over the champion is shown. {text}")
