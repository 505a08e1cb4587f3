"""Which weights sample which tokens, where sampling runs ahead of training. No torch.

A *version* of the weights is the number of steps that made it: step n is trained from version n to
version n + 1. With a staleness of m steps and k segments of L = ceil(T / k) tokens, segment j of
the replies of step n is sampled by version n - m + j (or 0, before there is any other):

    m = 2, k = 2    version 0        version 1        version 2        version 3
    step 0          all
    step 1          all
    step 2          first segment    rest
    step 3                           first segment    rest
    step 4                                            first segment    rest

So everything that one version samples (its *round*) is known before it is there: who is faster,
samplers or trainer, changes who waits for whom, and no result. A schedule by the clock, which puts
new weights in wherever a reply happens to be, would have slightly newer weights, and runs that
nobody can repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """What one round does for one step: unfinished replies go on to `end` tokens."""

    step: int
    start: int  # tokens that an unfinished reply has before
    end: int  # tokens that it may have afterwards


@dataclass(frozen=True)
class Schedule:
    """The rounds of a stage.

    Attributes:
        steps: of the stage.
        max_staleness: m >= 0. segments: k, from 1 to m + 1.
        max_new_tokens: T.
    """

    steps: int
    max_staleness: int
    segments: int
    max_new_tokens: int

    def end(self, step: int, version: int) -> int:
        """Tokens that the replies of a step may have after a version's round."""
        done = version - step + self.max_staleness + 1  # segments, also those before version 0
        if done <= 0 or version < 0:
            return 0
        length = -(-self.max_new_tokens // self.segments)
        return min(self.max_new_tokens, length * done)

    def round(self, version: int) -> list[Span]:
        """What the version samples, oldest step first."""
        first = 0 if version == 0 else max(0, version + self.max_staleness - self.segments + 1)
        spans = [
            Span(step, self.end(step, version - 1), self.end(step, version))
            for step in range(first, min(self.steps, version + self.max_staleness + 1))
        ]
        return [span for span in spans if span.start < span.end]

    def last_round(self, step: int) -> int:
        """The version whose round ends the replies of a step; at most the step itself."""
        return max(0, step - self.max_staleness + self.segments - 1)
