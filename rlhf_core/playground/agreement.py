"""How often voters and the reward model prefer the same reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.sources.votes import VOTES
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.store import Store
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel

Rate = Mapping[str, float]
"""`accuracy`, its 95 % interval `low` to `high`, and `n`, the number of pairs."""


@dataclass
class Agreement:
    """The scored votes of a store. Reads each record once; safe to use from threads.

    Attributes:
        accuracy: the `Rate` of a list of margins, by `rlhf_core.evaluation.statistics`.
    """

    store: Store
    accuracy: Callable[[Sequence[float]], Rate]
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, run: RunChoices) -> Rate | None:
        """The share of votes in which the run's reward model prefers the same reply.

        An equal score counts half; ties of voters, and votes without scores of these reward
        models, do not count.

        Returns:
            None without any such vote.

        Raises:
            StoreError: the votes cannot be read.
        """
        margins = self._margins(run)
        return self.accuracy(margins) if margins else None

    def _margins(self, run: RunChoices) -> list[float]:
        """Score of the better reply less that of the other one."""
        paths = self.store.list_records(f"{VOTES.folder}/")
        new = [path for path in paths if path not in self._known]
        records = in_parallel(self.store.read_record, new, REQUESTS_AT_ONCE)
        self._known |= {path: record or {} for path, record in zip(new, records, strict=True)}
        return [
            margin
            for path in paths
            if _is_of(self._known[path], run) and (margin := _margin(self._known[path])) is not None
        ]


def _is_of(record: Mapping[str, Any], run: RunChoices) -> bool:
    """Whether the run's reward models gave a vote's scores. Older records do not name them, and
    have the score of one member of an ensemble."""
    own = run.reward_models.digests if run.reward_models else ()
    named = record.get("reward_models")
    if named is None:
        return len(own) == 1 and record.get("run") == run.id
    return tuple(named) == own


def _margin(record: Mapping[str, Any]) -> float | None:
    models = record.get("models")
    if not isinstance(models, dict):
        return None  # a tie, or "both bad"
    try:
        return float(models["chosen"]["score"]) - float(models["rejected"]["score"])
    except (KeyError, TypeError, ValueError):  # without scores
        return None
