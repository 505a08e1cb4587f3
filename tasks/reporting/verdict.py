"""What an evaluation shows, in one word and one sentence: the gain beside its price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.reporting.judges import Judge
from tasks.reporting.prices import Names, collapsed, prices

State = Literal["better", "better at a price", "worse", "reward hacked", "not shown"]
LABELS = {"reward": "reward", "answers": "right answers", "gold": "gold score", "judge": "win rate"}
"""Key of a judge in evaluation.json -> what it measures."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers show.

    Attributes:
        text: sentences with the numbers.
        prices: what became worse.
        judges: those that were asked, by their key in evaluation.json.
    """

    state: State
    text: str
    prices: tuple[str, ...] = ()
    judges: Mapping[str, Judge] = field(default_factory=dict)

    def __str__(self) -> str:
        state = f"**{self.state}**" if self.state in ("worse", "reward hacked") else self.state
        return f"Verdict: {state}. {self.text}"

    def record(self) -> dict[str, Any]:
        """The verdict as data, for the record of a run."""
        judges = {
            key: {"name": j.name, "independent": j.independent, "why": j.why}
            for key, j in self.judges.items()
        }
        return {
            "state": self.state, "text": self.text, "prices": list(self.prices), "judges": judges,
        }  # fmt: skip


@dataclass(frozen=True)
class Signal:
    """What one judge says of the difference between the models.

    Attributes:
        change: of its score. low, high: of the 95 % interval.
        neutral: the value that says "equally good".
        greedy: the same change of greedy replies, if it is known: (mean, low, high).
    """

    label: str
    judge: Judge
    change: float
    low: float
    high: float
    neutral: float = 0.0
    greedy: tuple[float, float, float] | None = None

    @property
    def contradicted(self) -> bool:
        """Whether greedy replies changed the other way."""
        if self.greedy is None:
            return False
        _, low, high = self.greedy
        return (self.rose and high < 0) or (self.fell and low > 0)

    @property
    def rose(self) -> bool:
        return self.low > self.neutral

    @property
    def fell(self) -> bool:
        return self.high < self.neutral

    def __str__(self) -> str:
        if self.neutral:
            return f"{self.label} {self.change:.0%} ({self.low:.0%} to {self.high:.0%})"
        return f"{self.label} {self.change:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def conclude(
    data: Mapping[str, Any],
    start: str,
    names: Names,
    judges: Mapping[str, Judge],
    benchmarks: Mapping[str, Any] | None = None,
) -> Verdict:
    """The verdict on an evaluation.

    Args:
        data: evaluation.json. start: name of the model that the alignment started from.
        judges: by their key in the data, see `judges_of`; those without numbers are left out.
        benchmarks: lm_eval.json, if there is one.
    """
    signals = {key: s for key, judge in judges.items() if (s := _signal(data, start, key, judge))}
    asked = {key: judges[key] for key in signals}
    found = prices(data, start, names, benchmarks or {})
    few = collapsed(data, start)
    state, why = _decide(signals, few, names, bool(found))
    numbers = "; ".join(str(signal) for signal in signals.values())
    text = [f"{names.policy} over {names.start}: {numbers}." if numbers else "", why]
    text.append(f"The price: {'; '.join(found)}." if found else "")
    return Verdict(state, " ".join(filter(None, text)), tuple(found), asked)


def _decide(
    signals: Mapping[str, Signal], few: bool, names: Names, priced: bool
) -> tuple[State, str]:
    """The state, and why.

    Args:
        few: the replies have become alike. priced: something became worse.
    """
    rose = [s for s in signals.values() if s.rose]
    fell = [s for s in signals.values() if s.fell]
    agree = [s for s in rose if s.judge.independent]
    doubt = [s for key, s in signals.items() if s.fell and key != "reward"]
    if few and rose:
        return "reward hacked", (
            "The score rose, but not because the replies became better: they became alike."
        )
    if few:
        return "worse", "The replies became alike, and no score rose."
    if torn := [s for s in [*agree, *doubt] if s.contradicted]:
        return "not shown", _torn(torn)
    if doubt and agree:
        return "not shown", (
            f"The judges disagree: {_named(agree, 'prefer')} the new replies, {_named(doubt)} "
            f"those of {names.start}."
        )
    if doubt and rose:
        return "reward hacked", (
            f"{_sentence(_named(rose, 'give'))} a higher score, but not because the replies became "
            f"better: {_named(doubt, 'prefer')} those of {names.start}."
        )
    if agree:
        says = "; ".join(f"{s.judge.name}, which {s.judge.why}, agrees" for s in agree)
        return "better at a price" if priced else "better", f"{_sentence(says)}."
    if fell and not rose:
        return "worse", f"{_sentence(_named(fell, 'prefer'))} the replies of {names.start}."
    return "not shown", _unproven(list(signals.values()))


def _torn(signals: list[Signal]) -> str:
    """How sampled and greedy replies disagree."""
    found = [
        f"{s.label} {s.change:+.3f} of sampled replies and {s.greedy[0]:+.3f} of greedy ones"
        for s in signals
        if s.greedy is not None
    ]
    return f"Sampled and greedy replies disagree: {'; '.join(found)}."


def _unproven(signals: list[Signal]) -> str:
    """Why no gain is shown."""
    if independent := [s for s in signals if s.judge.independent]:
        return f"{_sentence(_named(independent, 'show'))} no gain: the interval includes no change."
    reasons = "; ".join(f"{s.judge.name} {s.judge.why}" for s in signals)
    return (
        f"No judge without a part in the training was asked{': ' if reasons else ''}{reasons}. So "
        "nobody knows whether the replies became better."
    )


def _named(signals: list[Signal], verb: str = "") -> str:
    names = " and ".join(signal.judge.name for signal in signals)
    return f"{names} {verb}{'s' if len(signals) == 1 else ''}" if verb else names


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _signal(data: Mapping[str, Any], start: str, key: str, judge: Judge) -> Signal | None:
    """What a judge says; None if its numbers are not there."""
    if key == "judge":
        # The length-controlled rate: such judges prefer longer replies.
        rate = (data.get("win_rate") or {}).get(key) or {}
        rate = rate.get("length_controlled") or rate
        if not {"rate", "low", "high"} <= rate.keys():
            return None
        return Signal(LABELS[key], judge, rate["rate"], rate["low"], rate["high"], 0.5)
    change = (data.get("differences") or {}).get(key)
    if change:
        greedy = (data.get("differences") or {}).get(f"greedy_{key}")
        return Signal(
            LABELS[key], judge, change["mean"], change["low"], change["high"],
            greedy=(greedy["mean"], greedy["low"], greedy["high"]) if greedy else None,
        )  # fmt: skip
    gain = _without_bootstrap(data, start, key)
    if gain is None:
        return None
    mean, error = gain
    return Signal(LABELS[key], judge, mean, mean - error, mean + error)


def _without_bootstrap(
    data: Mapping[str, Any], start: str, name: str
) -> tuple[float, float] | None:
    """Of an older evaluation: the difference and two standard errors, which are paired for the gold
    score; else they are unpaired, and too large for paired prompts."""
    paired = data.get(f"{name}_gain")
    if paired:
        return paired["mean"], 2 * paired["se"]
    models = data.get("models") or {}
    before, after = models.get(start) or {}, models.get("policy") or {}
    mean, error = f"{name}_mean", f"{name}_se"
    if any(
        not isinstance(row.get(k), int | float) for row in (before, after) for k in (mean, error)
    ):
        return None
    return after[mean] - before[mean], 2 * (before[error] ** 2 + after[error] ** 2) ** 0.5
