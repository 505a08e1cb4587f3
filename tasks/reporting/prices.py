"""What became worse from the start model to the final one, whatever the judges say of the gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What counts as a price, beside the model that the alignment started from.
MORE_ALIKE = 1.5  # times the share of replies that begin alike, and 5 points more
LESS_DISTINCT = 0.9  # of its distinct-2
MORE_ECHO = 1.5  # times its self-BLEU, and 0.05 more
LESS_ENTROPY = 0.75  # of its nats per token
HIGHER_LOSS = 1.05  # times its held-out loss
LONGER = 1.5  # times its mean length, or as much shorter
POINTS = 0.05  # of the shares of repeated replies, refusals and other scripts
FEWER_ENDS = 0.1  # of the share of finished replies
# What no gain makes up for: the replies are one reply.
COLLAPSED_DISTINCT = 0.5  # of its distinct-2
COLLAPSED_ALIKE = 0.4  # of all replies begin alike, three times as many as before


@dataclass(frozen=True)
class Names:
    """Display names: the final model, and the one that it started from."""

    policy: str
    start: str


@dataclass(frozen=True)
class Pair:
    """Numbers of the start model and of the final one.

    Attributes:
        greedy: " of the greedy replies" for those, else "".
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    greedy: str = ""

    def of(self, name: str) -> tuple[float, float] | None:
        """A number of both; None if one lacks it."""
        values = self.before.get(name), self.after.get(name)
        return values if all(isinstance(v, int | float) for v in values) else None  # type: ignore[return-value]


def pairs(data: Mapping[str, Any], start: str) -> list[Pair]:
    """Both models' sampled replies, and their greedy ones where there are any."""
    models, greedy = data.get("models") or {}, (data.get("greedy") or {}).get("models") or {}
    found = [Pair(models.get(start) or {}, models.get("policy") or {})]
    if greedy:
        replies = greedy.get(start) or {}, greedy.get("policy") or {}
        found.append(Pair(*replies, " of the greedy replies"))
    return found


def collapsed(data: Mapping[str, Any], start: str) -> bool:
    """Whether the final model's replies have become few."""
    for pair in pairs(data, start):
        alike, distinct = pair.of("top_opening"), pair.of("distinct_2")
        if alike and alike[1] >= COLLAPSED_ALIKE and alike[1] >= 3 * alike[0]:
            return True
        if distinct and distinct[1] < COLLAPSED_DISTINCT * distinct[0]:
            return True
    return False


def prices(
    data: Mapping[str, Any], start: str, names: Names, benchmarks: Mapping[str, Any]
) -> list[str]:
    """What became worse, as sentences without an end.

    Args:
        benchmarks: lm_eval.json; empty without one.
    """
    sampled, *greedy = pairs(data, start)
    found = [*_variety(sampled, names), *_behaviour(sampled)]
    for pair in greedy:
        found += _variety(pair, names)
    found += _knowledge(data, start, names)
    return [*found, *_benchmarks(benchmarks)]


def _variety(pair: Pair, names: Names) -> Iterator[str]:
    if alike := pair.of("top_opening"):
        old, new = alike
        if new > MORE_ALIKE * old and new > old + POINTS:
            opening = pair.after.get("opening", "")
            replies = "greedy replies" if pair.greedy else "replies"
            yield (
                f'{new:.0%} of the {replies} begin with "{opening}" ({names.start}: {old:.0%} '
                "begin alike)"
            )
    if distinct := pair.of("distinct_2"):
        old, new = distinct
        if new < LESS_DISTINCT * old:
            yield f"distinct-2{pair.greedy} fell from {old:.2f} to {new:.2f}"
    if echo := pair.of("self_bleu"):
        old, new = echo
        if new > MORE_ECHO * old and new > old + POINTS:
            yield f"self-BLEU{pair.greedy} rose from {old:.2f} to {new:.2f}"
    if (same := pair.of("repeated")) and same[1] > same[0] + POINTS:
        replies = "greedy replies" if pair.greedy else "replies"
        yield f"{same[1]:.0%} of the {replies} answer several prompts ({same[0]:.0%} before)"


def _behaviour(pair: Pair) -> Iterator[str]:
    if (ends := pair.of("finished")) and ends[1] < ends[0] - FEWER_ENDS:
        yield f"{ends[1]:.0%} of the replies end by themselves ({ends[0]:.0%} before)"
    if (entropy := pair.of("entropy")) and entropy[1] < LESS_ENTROPY * entropy[0]:
        yield f"the entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats per token"
    if length := pair.of("length_mean"):
        old, new = length
        if new > LONGER * old or new < old / LONGER:
            yield f"the replies have {new:.0f} tokens instead of {old:.0f}"
    for name, what in (("refusals", "decline to answer"),
                       ("language_changes", "have another script than the prompt")):  # fmt: skip
        if (share := pair.of(name)) and share[1] > share[0] + POINTS:
            yield f"{share[1]:.0%} of the replies {what} ({share[0]:.0%} before)"


def _knowledge(data: Mapping[str, Any], start: str, names: Names) -> Iterator[str]:
    heldout = data.get("heldout") or {}
    losses = [float((heldout.get(m) or {}).get("loss") or 0) for m in (start, "policy")]
    if losses[0] and losses[1] > HIGHER_LOSS * losses[0]:
        yield f"the held-out loss rose from {losses[0]:.2f} to {losses[1]:.2f}"
    asked = (data.get("questions") or {}).get("models") or {}
    right = [(asked.get(m) or {}).get("rate") for m in (start, "policy")]
    change = (data.get("differences") or {}).get("questions") or {}
    if None not in right and change.get("high", 0.0) < 0:
        yield (
            f"{right[1]:.0%} of the general questions are answered right ({names.start}: "
            f"{right[0]:.0%})"
        )


def _benchmarks(benchmarks: Mapping[str, Any]) -> Iterator[str]:
    """Benchmarks that fell by more than two standard errors from the base model to the final."""
    about = benchmarks.get("tasks") or {}
    for task in benchmarks.get("shown") or []:
        better = (about.get(task) or {}).get("higher_is_better") or {}
        for key, change in ((benchmarks.get("change") or {}).get(task) or {}).items():
            metric = key.partition(",")[0]
            value, error = change.get("value"), change.get("stderr")
            if metric not in better or value is None or error is None:
                continue
            lost = -value if better[metric] else value
            if lost > 2 * error:
                yield (
                    f"{task} {metric} {'fell' if value < 0 else 'rose'} by {abs(value):.3g} ± "
                    f"{error:.2g} from base"
                )
