"""The best point of a stage: evaluation on held-out rows every n steps, early stop, and which
weights are the stage's result.

All is decided from the stage's lines in metrics.jsonl, which its checkpoints hold together with the
best weights so far: a stage that goes on from a checkpoint decides as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.errors import DataError
from rlhf_core.jobs.training import HeldOutJob
from rlhf_core.training.checkpoint import Checkpointer

Line = Mapping[str, Any]
Evaluate = Callable[[], Mapping[str, float]]
"""Numbers of the model as it is now, each named heldout_...; every rank calls it."""

KL = "heldout_kl"  # nats per reply


@dataclass(frozen=True)
class Criterion:
    """What makes an evaluation better than another.

    Attributes:
        metric: its name in metrics.jsonl.
        highest: whether more of it is better.
        kl_budget: an evaluation whose KL is above it is worse than any within; of several such the
            one with the lowest KL is the best. None: there is no KL.
    """

    metric: str
    highest: bool
    kl_budget: float | None = None

    def within(self, line: Line) -> bool:
        """Whether an evaluation keeps the budget."""
        return self.kl_budget is None or bool(line[KL] <= self.kl_budget)

    def order(self, line: Line) -> tuple[bool, float]:
        """The better of two evaluations has the greater one."""
        within = self.within(line)
        value = -line[KL] if not within else line[self.metric] * (1 if self.highest else -1)
        return within, -math.inf if math.isnan(value) else value

    def evaluations(self, lines: Sequence[Line]) -> list[Line]:
        """Those among a stage's metrics, oldest first; that of the untrained model (step 0) is not
        one."""
        return [line for line in lines if self.metric in line and line["step"] > 0]

    def best(self, lines: Sequence[Line]) -> Line | None:
        """The best evaluation; of equal ones the first, None if there is none."""
        return max(self.evaluations(lines), key=self.order, default=None)

    def since_best(self, lines: Sequence[Line]) -> int:
        """Evaluations after the best one."""
        best = self.best(lines)
        return 0 if best is None else sum(x["step"] > best["step"] for x in self.evaluations(lines))


LOWEST_LOSS = Criterion("heldout_loss", highest=False)


class Selection:
    """Decides for a stage. Every rank calls every method."""

    def __init__(
        self, job: HeldOutJob, checkpointer: Checkpointer, criterion: Criterion, rows: int
    ) -> None:
        """Nothing is evaluated yet.

        Args:
            rows: held-out rows that an evaluation can use.

        Raises:
            DataError: the job evaluates, and there are none.
        """
        self.job, self.checkpointer, self.criterion = job, checkpointer, criterion
        self.context, self.group = checkpointer.context, checkpointer.strategy.group
        self.name = checkpointer.job.algorithm
        if job.eval_every is not None and rows == 0:
            raise DataError(
                f"{self.name}.eval_every is {job.eval_every}, but the stage's data set holds no "
                "rows out to evaluate on: raise heldout_fraction of its data settings, or clear "
                "eval_every."
            )

    def steps(self, start: int, total: int) -> Iterator[int]:
        """The steps (from 0) that are left, until patience is at its end.

        Args:
            start: finished steps.
        """
        for step in range(start, total):
            if self._impatient(step):
                return
            yield step

    def _impatient(self, step: int) -> bool:
        """Whether the stage ends after so many steps; decided after each evaluation."""
        patience, every = self.job.patience, self.job.eval_every
        if patience is None or every is None or step % every:
            return False
        since = self.criterion.since_best(self.context.read_metrics()) if self.context.main else 0
        since = self.group.broadcast(since)
        if since >= patience:
            self.context.log(
                f"stopped after step {step}: {since} evaluations in a row were not the best so far"
            )
        return bool(since >= patience)

    def _is_due(self, step: int, total: int) -> bool:
        """Whether there is an evaluation after a step (from 1)."""
        every = self.job.eval_every
        return every is not None and (step % every == 0 or step == total)

    def measure(self, step: int, total: int, evaluate: Evaluate) -> Mapping[str, float]:
        """The evaluation after a step (from 1) if one is due, else nothing."""
        return evaluate() if self._is_due(step, total) else {}

    def keep(self, step: int, total: int) -> None:
        """Keep the weights of a step (from 1) whose metrics are logged, if it has the best
        evaluation so far."""
        if self.job.selects and self._is_due(step, total):  # reading all lines takes time
            lines = self.context.read_metrics() if self.context.main else []
            best = self.criterion.best(lines)
            if self.group.broadcast(best is not None and best["step"] == step):
                self.checkpointer.keep_best()

    def after_step(
        self, step: int, total: int, metrics: Mapping[str, float], evaluate: Evaluate
    ) -> None:
        """Evaluate the model, log the step's metrics, keep the weights, save a checkpoint: each
        where it is due.

        Args:
            step: finished steps, from 1.

        Raises:
            Preempted: the job was told to stop; the state is saved.
        """
        found = self.measure(step, total, evaluate)
        self.context.log_metrics(step, total, {**metrics, **found})
        self.keep(step, total)
        self.checkpointer.after_step(step, total)

    def heldout(self, total: int, evaluate: Evaluate) -> dict[str, Any]:
        """Held-out metrics of the weights that are the stage's result, and their steps, for its
        metadata. Where the stage was evaluated in training, rank 0 alone has them.

        Args:
            total: steps of the stage.
        """
        if self.job.eval_every is None:
            found = {"steps": total, **evaluate()}
        else:
            names = ("steps", "best", "heldout_")
            found = {k: v for k, v in self.result().items() if k.startswith(names)}
        shown = {k: v for k, v in found.items() if k.startswith("heldout_")}
        self.context.log("  ".join(f"{k} {v:.4g}" for k, v in shown.items()))
        return found

    def result(self) -> dict[str, Any]:
        """Metrics of the step whose weights are the stage's result, and its number as "steps";
        where the stage was evaluated also "best". Rank 0 alone has them.

        best: "step" of the best evaluation, "by" which metric, and whether it is "within" the
        budget of KL.
        """
        if not self.context.main:
            return {}
        lines = self.context.read_metrics()
        chosen, more = lines[-1], {}
        if self.job.eval_every is not None:
            best = self.criterion.best(lines)
            assert best is not None, "the last step of a stage is evaluated"
            chosen = best if self.job.selects else chosen
            self._tell(lines, best, chosen)
            within = self.criterion.within(best)
            more["best"] = {"step": best["step"], "by": self.criterion.metric, "within": within}
        metrics = {k: v for k, v in chosen.items() if k not in ("step", "total", "time")}
        return {"steps": chosen["step"], **metrics, **more}

    def _tell(self, lines: Sequence[Line], best: Line, chosen: Line) -> None:
        """Say which weights are the result, and warn where they are no good."""
        metric = self.criterion.metric
        kl = f", KL {best[KL]:.4g} nats a reply" if KL in best else ""
        self.context.log(
            f"the best evaluation is that after step {best['step']} ({metric} "
            f"{best[metric]:.4g}{kl}); the result has the weights after step {chosen['step']}"
        )
        if not self.criterion.within(best):
            self.context.log(
                f"WARNING: no evaluation is within {self.name}.kl_budget "
                f"{self.criterion.kl_budget:g}; the best one is that with the lowest KL. Raise "
                f"{self.name}.kl_coef, lower learning_rate or evaluate more often"
            )
        sign = 1 if self.criterion.highest else -1
        start = next((x for x in lines if x["step"] == 0 and metric in x), None)
        if start is not None and sign * (best[metric] - start[metric]) <= 0:
            self.context.log(
                f"WARNING: no evaluation is better than that of the untrained model ({metric} "
                f"{start[metric]:.4g}): training has gained nothing"
            )
