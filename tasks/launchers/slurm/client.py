"""Slurm's commands, repeated while the login node or the controller does not answer."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.jobs.launchers import SlurmLauncher
from rlhf_core.system.secrets import redact
from tasks.launchers.slurm import script, state
from tasks.launchers.slurm.shell import Output, Shell, Unreachable

OUTAGE_SECONDS = 3600.0  # without login node or controller, before a stage gives up
RETRY_SECONDS = 5.0
CHUNK = 1_000_000  # bytes of output that one look reads
CODE = b"rlhf-code "  # between the answer of scontrol with its exit code, and the job's output
# What Slurm's commands say when their controller does not answer.
PASSING = re.compile(
    r"unable to contact slurm|socket timed out|zero bytes|standby|connect(ion)? (failure|refused"
    r"|timed out)|temporarily|try again|too many",
    re.I,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What one look at a job shows: its state, None if Slurm has forgotten it, and new output."""

    job: state.JobState | None
    output: bytes


class Client:
    """Slurm's commands on this machine or on a login node."""

    def __init__(self, settings: SlurmLauncher) -> None:
        self.settings = settings
        self.shell = Shell(settings.host)

    def live(self, name: str, outage: float = OUTAGE_SECONDS) -> list[str]:
        """Ids of this user's queued or running jobs with a name, oldest first."""
        listing = f"squeue -h --me --name={shlex.quote(name)} -t all -o '%i|%T'"
        return self._repeat(lambda: state.live_jobs(self._answer(listing)), outage)

    def submit(self, name: str, text: str, variables: dict[str, str]) -> str:
        """Submit a batch script; returns the id of its job.

        A submission whose answer was lost may have succeeded: so before it is repeated, the job is
        looked for by its name.

        Raises:
            ConfigError: Slurm refuses the job.
        """
        began = time.monotonic()
        while True:
            try:
                done = self.shell.run(script.submission(self.settings, text, variables))
                if done.code == 0:
                    return done.text.strip().splitlines()[-1].partition(";")[0]  # "12;CLUSTER"
                problem = done.stderr
                if not PASSING.search(problem):
                    raise ConfigError(
                        f"Slurm refuses the job {name}: {_short(problem)}; correct the settings of "
                        "launcher (partition, account, qos, time_limit, gres, options), or "
                        "resources.nodes and ranks."
                    )
            except Unreachable as error:
                problem = str(error)
            _wait(began, OUTAGE_SECONDS, problem)
            if found := self.live(name):
                return found[0]

    def look(self, job: str, path: str, offset: int) -> Look:
        """State of a job, and at most CHUNK bytes of its output from an offset."""
        commands = (
            f"cd\nscontrol show job -o {shlex.quote(job)} 2>&1; printf '\\nrlhf-code %s\\n' $?\n"
            f"tail -c +{offset + 1} {shlex.quote(path)} 2>/dev/null | head -c {CHUNK}"
        )

        def once() -> Look:
            head, _, rest = self.shell.run(commands).stdout.partition(CODE)
            return Look(state.parse_job(head.decode("utf-8", "replace")), rest.partition(b"\n")[2])

        return self._repeat(once)

    def place_in_queue(self, job: state.JobState) -> int | None:
        """Place of a pending job among those of its partition that this user may see."""
        listing = f"squeue -h -t PENDING -p {shlex.quote(job.partition)} -o '%i|%Q'"
        try:
            return state.place_in_queue(self._answer(listing), job.id)
        except (ValueError, Unreachable):
            return None  # it is only for messages

    def cancel(self, jobs: list[str]) -> None:
        """Cancel jobs, with a comment that tells pipelines which share them that nobody but a
        pipeline did so."""
        commands = [
            f"scontrol update JobId={shlex.quote(job)} Comment={state.STOPPED}\n"
            f"scancel {shlex.quote(job)}"
            for job in jobs
        ]
        self.shell.run("\n".join(commands))

    def _answer(self, commands: str) -> str:
        """What commands print. Raises ValueError with their message if they fail."""
        done: Output = self.shell.run(commands)
        if done.code:
            raise ValueError(done.stderr or done.text or f"exit code {done.code}")
        return done.text

    def _repeat(self, call: Callable[[], T], outage: float = OUTAGE_SECONDS) -> T:
        """The result of a call that raises Unreachable or ValueError while Slurm is away."""
        began = time.monotonic()
        while True:
            try:
                return call()
            except (Unreachable, ValueError) as error:
                _wait(began, outage, str(error))


def _wait(began: float, outage: float, problem: str) -> None:
    if time.monotonic() - began > outage:
        raise JobFailed(
            f"Slurm did not answer for {outage:.0f} s: {_short(problem)}", category="lost"
        )
    time.sleep(RETRY_SECONDS)


def _short(text: str) -> str:
    return redact(" ".join(text.split())[-500:])
