"""Sampling ahead of training: the rounds of `rollout.schedule`, in samplers of their own.

After each step its weights are handed over, and one more round is put in line. A thread of rank 0
has the samplers work through the rounds, and keeps what they return: `take` gives the replies of a
step when all of them are whole, and waits for that where they are not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from rlhf_core.nn.modules import Policy
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.rollout.handover import Handover
from rlhf_core.rollout.queue import Queue, QueuedReply, load_queue, save_queue
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.rollout.schedule import Schedule, Span
from rlhf_core.training.online.sampler_process import Row
from rlhf_core.training.online.samplers import Samplers, ends

QUEUE = "rollouts.safetensors"
WEIGHTS = "rollout-weights-{}.safetensors"  # of a version

Prompts = Callable[[int], Sequence[list[int]]]
"""Step -> token ids of the prompt of each of its replies."""


class Ahead:
    """The rounds of a stage. Every rank has one; rank 0 does the work."""

    def __init__(self, samplers: Samplers, schedule: Schedule, start: int, saved: Path) -> None:
        """Go on where a checkpoint was.

        Args:
            start: finished steps.
            saved: folder with what `snapshot` has written into the checkpoint, if there is one.
        """
        self.samplers, self.schedule = samplers, schedule
        self.main = samplers.strategy.rank == 0
        self.idle_seconds = 0.0
        """For which the samplers have waited for weights so far; on rank 0."""
        self.asks: dict[int, OnFinished] = {}
        """Step -> what is handed each of its replies that is whole, on rank 0, in the samplers'
        thread."""
        self._queue: Queue = {}
        self._prompts: dict[int, Sequence[list[int]]] = {}
        self._rounds = 0  # finished
        self._handed: dict[int, Handover] = {}  # of the versions whose rounds are not finished
        self._running: dict[int, Future[None]] = {}  # version -> its round
        self._lock = threading.Lock()  # of all of these
        self._left_off = time.monotonic()
        if self.main and (saved / QUEUE).exists():
            self._queue, self._rounds = load_queue(saved / QUEUE)
            self._handed = {
                version: Handover(saved / WEIGHTS.format(version))
                for version in range(self._rounds, start)
            }
        self._submitted = self._rounds
        assert start == 0 or self._rounds or not self.main, "the checkpoint has no rollouts"

    # ------------------------------------------------------------------ every rank

    def take(self, step: int, policy: Policy, prompts: Prompts) -> list[QueuedReply] | None:
        """The replies of a step that is to be trained from the policy as it is now.

        Returns:
            On every rank the replies; None where the job was told to stop meanwhile.

        Raises:
            JobFailed: a sampler has failed or died; on rank 0.
        """
        handed = None
        if self.samplers.strategy.group.broadcast(step >= self._submitted):
            handed = self.samplers.hand_over(policy)
        replies = None
        if self.main:
            self._put_in_line(step, handed, prompts)
            replies = self._wait_for(step)
        return self.samplers.strategy.group.broadcast(replies)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ rank 0 alone

    def _put_in_line(self, step: int, handed: Handover | None, prompts: Prompts) -> None:
        with self._lock:
            for old in [s for s in self._queue if s < step]:
                del self._queue[old]
                self._prompts.pop(old, None)
                self.asks.pop(old, None)
            if handed is not None:
                self._handed[step] = handed
            for version in range(self._submitted, step + 1):
                for span in self.schedule.round(version):
                    if span.step not in self._prompts:
                        self._prompts[span.step] = prompts(span.step)
                self._running[version] = self.samplers.thread.submit(self._sample_round, version)
            self._submitted = max(self._submitted, step + 1)

    def _wait_for(self, step: int) -> list[QueuedReply] | None:
        last = self.schedule.last_round(step)
        if (running := self._running.get(last)) is not None:
            if not ends(running):
                return None
            running.result()
        with self._lock:
            for version in [v for v in self._running if v <= last]:
                del self._running[version]
            return self._queue[step]

    def _sample_round(self, version: int) -> None:
        """In the thread: one round, whose results count as a whole or not at all."""
        assert version == self._rounds, f"round {version} after {self._rounds} rounds"
        self.idle_seconds += time.monotonic() - self._left_off
        spans = self.schedule.round(version)
        with self._lock:
            weights = self._handed[version]
            before = {span.step: self._before(span) for span in spans}
            places, rows = self._rows(spans, before)
        hand_out = partial(self._hand_out, places, before)
        found = self.samplers.ask(weights, rows, hand_out) if rows else []
        for (step, i), new in zip(places, found, strict=True):
            marked = QueuedReply(new.ids, new.logprobs, [version] * len(new.ids), new.finished)
            before[step][i] = before[step][i].longer(marked)
        with self._lock:
            self._queue |= before
            self._rounds = version + 1
            self._handed.pop(version).close()
        self._left_off = time.monotonic()

    def _hand_out(
        self, places: Sequence[tuple[int, int]], before: Queue, replies: Sequence[FinishedReply]
    ) -> None:
        """Hand out those of a round's replies that are whole."""
        for new in replies:
            step, i = places[new.row]
            ids = before[step][i].ids + new.ids
            whole = new.finished or len(ids) == self.schedule.max_new_tokens
            if whole and (ask := self.asks.get(step)) is not None:
                logprobs = before[step][i].logprobs + new.logprobs
                ask([FinishedReply(i, ids, logprobs, new.finished)])

    def _before(self, span: Span) -> list[QueuedReply]:
        """The replies of a step as they are before its part of a round."""
        if span.step in self._queue:
            return list(self._queue[span.step])
        return [QueuedReply() for _ in self._prompts[span.step]]

    def _rows(
        self, spans: Sequence[Span], before: Queue
    ) -> tuple[list[tuple[int, int]], list[Row]]:
        """The replies that a round goes on with: their step and place in it, and their rows."""
        places, rows = [], []
        seed = self.samplers.job.seed
        for step, start, end in spans:
            replies, prompts = before[step], self._prompts[step]
            going_on = [i for i, r in enumerate(replies) if not r.finished and len(r.ids) == start]
            for i, row_seed in zip(going_on, make_row_seeds(seed, step, going_on), strict=True):
                ids = [*prompts[i], *replies[i].ids]
                rows.append(Row(len(rows), ids, row_seed, start, end - start))
                places.append((step, i))
        return places, rows

    def snapshot(self, step: int) -> Callable[[Path], None]:
        """What a checkpoint after so many finished steps needs to go on with equal replies: those
        that are there, and the weights of earlier steps whose rounds are not finished.

        Returns:
            What writes it into a folder, in any thread, once or more.
        """
        with self._lock:
            queue = {s: list(replies) for s, replies in self._queue.items() if s >= step}
            rounds = self._rounds
            weights = {v: h.shared() for v, h in self._handed.items() if rounds <= v < step}

        def write(folder: Path) -> None:
            save_queue(queue, rounds, folder / QUEUE)
            for version, handed in weights.items():
                handed.copy(folder / WEIGHTS.format(version))

        return write
