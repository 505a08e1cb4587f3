"""The `slurm` launcher: it submits a stage as a batch job, follows it, and continues it.

Slurm says in which state a job is, the store how it ended. A job is found again by its name, which
follows from the stage keys and the store: a pipeline that was killed and is started again joins
the job that is still queued or running.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from rlhf_core.errors import JobFailed
from rlhf_core.jobs.launchers import SlurmLauncher
from rlhf_core.runtime.launches import forget, launch_id, write_jobs
from rlhf_core.store import Store, open_store
from tasks.launchers.base import Launch, LineSink, Outcome, ProgressSink
from tasks.launchers.command import agent_command
from tasks.launchers.outcome import failure, results
from tasks.launchers.slurm import script
from tasks.launchers.slurm.client import CHUNK, Client
from tasks.launchers.slurm.output import JobOutput
from tasks.launchers.slurm.state import (
    HELD,
    NEVER_STARTS,
    JobState,
    scheduler_view,
    what_next,
)
from tasks.launchers.waits import Waits, ordinal

FIRST_SECONDS = 30.0  # after a submission, in which a job is looked at more often
FIRST_POLL = 1.0
GONE_SECONDS = 90.0  # for a cancelled job to end: after KillWait Slurm kills what is left
CANCEL_OUTAGE = 30.0  # seconds without Slurm in which a cancellation is repeated
MAX_STOPPED = 3  # jobs that other pipelines may cancel, one after another, before giving up


class Slurm:
    """Runs a launch as a Slurm job."""

    def __init__(self, settings: SlurmLauncher) -> None:
        self.settings = settings
        self.client = Client(settings)

    def prepare(self) -> None:
        """See `Launcher.prepare`. Nothing to do: imports happen on the nodes."""

    def run(self, launch: Launch, on_output: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """See `Launcher.run`. If the caller is interrupted, the job is cancelled."""
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        return _Stage(self.settings, self.client, launch, on_output, on_progress).run()


@dataclass(frozen=True)
class _Ended:
    """A job that is over.

    Attributes:
        state: its last one; None if Slurm has forgotten it.
        attempt: name of its last start.
    """

    id: str
    state: JobState | None
    attempt: str


class _Stage:
    """One launch: its jobs, one after another, until one has the results or cannot."""

    def __init__(
        self,
        settings: SlurmLauncher,
        client: Client,
        launch: Launch,
        on_output: LineSink,
        on_progress: ProgressSink,
    ) -> None:
        self.settings, self.client, self.launch = settings, client, launch
        self.on_output, self.on_progress = on_output, on_progress
        self.jobs = list(launch.jobs.values())
        self.nodes = self.jobs[0].placement().nodes if self.jobs[0].torchrun else 1
        self.store: Store = open_store(launch.store)
        self.id = launch_id(self.jobs)
        self.name = job_name(launch.name, self.id, self.store.url)
        self.restarts = 0  # of jobs before the present one
        self.stopped = 0

    def run(self) -> list[Outcome]:
        while True:
            try:
                ended = self._follow(self._find_or_submit())
            except BaseException:  # cancelled or timed out, or it cannot start
                self.on_output("cancelling the Slurm job of this stage")
                self._cancel()
                raise
            if (found := results(self.launch)) is not None:
                forget(self.store, self.id)
                return found
            self._judge(ended)

    def _find_or_submit(self) -> str:
        """The id of the queued or running job of this launch, or of a new one.

        Of two that were submitted at the same time the older one stays, so that both pipelines
        follow the same job.
        """
        if found := self.client.live(self.name):
            self.on_output(f"joining Slurm job {found[0]}, submitted earlier")
            return found[0]
        write_jobs(self.store, self.launch.name, self.jobs)
        agent = agent_command(
            self.store.url, self.id, "$RLHF_ATTEMPT", self.nodes, "$SLURM_NODEID",
            "$RLHF_RENDEZVOUS", scratch=self.settings.scratch, python=self.settings.python,
        )  # fmt: skip
        text = script.batch_script(self.settings, self.name, self.jobs[0], agent)
        own = self.client.submit(self.name, text, script.passed(self.settings))
        live = self.client.live(self.name)
        if live and live[0] != own:
            self.client.cancel([own])
            own = live[0]
        self.on_output(f"Slurm job {own}, {self.name}")
        return own

    # ------------------------------------------------------------------ follow

    def _follow(self, job_id: str) -> _Ended:
        """Wait until a job is over; pass on its output, and what it waits for."""
        output = JobOutput(self.launch.log, self.on_output, self.on_progress, self.nodes > 1)
        path = script.output_path(self.settings, self.name, job_id)
        timeout = self.settings.queue_timeout
        waits = Waits(
            timeout,
            f"Slurm job {job_id} of {self.launch.name} did not start within "
            f"launcher.queue_timeout, {timeout} s: ask for less (nodes, time_limit), use another "
            "partition, or raise it.",
            self.on_output, self.on_progress,
        )  # fmt: skip
        began, restarts = time.monotonic(), 0
        while True:
            look = self.client.look(job_id, path, output.offset)
            job = look.job
            over = job is None or job.ended
            output.feed(look.output, last=over and len(look.output) < CHUNK)
            if len(look.output) == CHUNK:
                continue  # there is more to read
            if job is not None and job.restarts > restarts:
                restarts = job.restarts
                self._count_restart(job)
            if over:
                waits.over()
                return _Ended(job_id, job, f"{job_id}-{restarts}")
            assert job is not None
            if job.waiting:
                self._check_reason(job)
                waits.report(lambda job=job: self._why_it_waits(job))  # type: ignore[misc]
            else:
                waits.over()
            fresh = time.monotonic() - began < FIRST_SECONDS
            poll = self.settings.poll_seconds
            time.sleep(min(FIRST_POLL, poll) if fresh else poll)

    def _count_restart(self, job: JobState) -> None:
        """Tell of a requeue. Raises JobFailed if there were too many."""
        count = self.restarts + job.restarts
        self.on_output(
            f"Slurm job {job.id} was requeued and goes on from its last checkpoint "
            f"(restart {count} of at most {self.settings.max_restarts})"
        )
        if count > self.settings.max_restarts:
            raise self._too_often(job.id)

    def _check_reason(self, job: JobState) -> None:
        """Raises JobFailed if a pending job can never start."""
        if wrong := NEVER_STARTS.get(job.reason):
            raise JobFailed(
                f"{self.launch.name} failed: its job would never start (Slurm: {job.reason}): "
                f"{wrong}",
                category="config",
            )
        if HELD.search(job.reason):
            raise JobFailed(
                f"{self.launch.name} failed: Slurm gave up requeueing job {job.id} ({job.reason})",
                category="lost",
            )

    def _why_it_waits(self, job: JobState) -> str:
        """Such as "Resources, 3rd in the queue of main, expected to start at 2026-11-30T01:44"."""
        parts = [job.reason if job.reason not in ("", "None") else job.state.lower()]
        if (place := self.client.place_in_queue(job)) is not None:
            parts.append(f"{ordinal(place)} in the queue of {job.partition}")
        if job.start:
            parts.append(f"expected to start at {job.start[:16].replace('T', ' ')}")
        return ", ".join(parts)

    # ------------------------------------------------------------------ end

    def _judge(self, ended: _Ended) -> None:
        """Returns if the stage is to be submitted again; else raises JobFailed with the reason."""
        path = script.output_path(self.settings, self.name, ended.id)
        error = failure(
            self.store, self.launch.name, self.id, ended.attempt, self.nodes,
            where=f"Slurm job: {ended.id}, output: {path}\nFull log: {self.launch.log}",
            scheduler=scheduler_view(ended.state),
        )  # fmt: skip
        following = what_next(ended.state, error.category)
        if following == "fail":
            raise error
        reason = str(error).splitlines()[0].removeprefix(f"{self.launch.name} failed: ")
        if following == "restart":
            self.stopped += 1
            if self.stopped > MAX_STOPPED:
                raise error
            self.on_output("another pipeline that shared the job was stopped; submitting it anew")
            return
        self.restarts += 1 + (ended.state.restarts if ended.state is not None else 0)
        if self.restarts > self.settings.max_restarts:
            raise self._too_often(ended.id)
        self.on_output(f"{reason}; submitting it again, to go on from the last checkpoint")

    def _too_often(self, job_id: str) -> JobFailed:
        return JobFailed(
            f"{self.launch.name} failed: it was interrupted more than launcher.max_restarts times "
            f"({self.settings.max_restarts}); give it more time (time_limit), a partition that "
            f"preempts less, or checkpoint more often\nSlurm job: {job_id}",
            category="interrupted",
        )

    def _cancel(self) -> None:
        """Cancel the launch's jobs and wait until their processes are gone."""
        try:
            live = self.client.live(self.name, CANCEL_OUTAGE)
            if live:
                self.client.cancel(live)
            end = time.monotonic() + GONE_SECONDS
            while live and time.monotonic() < end:
                time.sleep(1.0)
                live = self.client.live(self.name, CANCEL_OUTAGE)
            left = f"still ends after {GONE_SECONDS:.0f} s" if live else ""
        except Exception as error:  # must not replace the reason
            left = f"could not be cancelled: {error}"
        if left:
            self.on_output(f"WARNING: a Slurm job {self.name} {left}; see: squeue -n {self.name}")


def job_name(stage: str, launch: str, store: str) -> str:
    """Name of a launch's jobs: the stage, and a digest of the launch and of its store."""
    return f"rlhf-{stage}-{hashlib.sha256(f'{launch} {store}'.encode()).hexdigest()[:16]}"
