"""What Slurm says about a job, and what follows from it. Pure functions on the commands' output.

`scontrol show job -o` and `squeue -o` have the same form in Slurm 22.05 and 24.11. Their JSON has
not: 22.05 ignores `squeue -j ID --json`, and the types of its fields have changed since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

FINAL = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL",
    "OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
})  # fmt: skip
"""States of jobs that have ended. All others, such as COMPLETING, may still have processes."""
INTERRUPTED = frozenset({"BOOT_FAIL", "LAUNCH_FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"})
"""Ends that are no fault of the job: it is continued from its last checkpoint."""
NEVER_STARTS = {
    "AccountNotAllowed": "launcher.account may not use the partition",
    "BadConstraints": "no node has what launcher.constraint, gres and the like ask for",
    "DependencyNeverSatisfied": "launcher.options name a dependency that failed",
    "InvalidAccount": "launcher.account is not known to the cluster",
    "InvalidQOS": "launcher.qos is not allowed for this account or partition",
    "PartitionNodeLimit": "the stage's resources.nodes exceed the partition's limit",
    "PartitionTimeLimit": "launcher.time_limit exceeds the partition's limit",
    "QOSNotAllowed": "launcher.qos may not use the partition",
}
"""Reasons for which Slurm keeps a job pending for ever -> what is wrong."""
HELD = re.compile(r"JobHoldMaxRequeue|launch.?failed.?requeued.?held", re.I)
"""Reasons for which Slurm has given up requeueing a job by itself."""
STOPPED = "rlhf-stopped"
"""Comment of a job that a pipeline has cancelled; a job that a person cancels has none."""

Next = Literal["continue", "restart", "fail"]


@dataclass(frozen=True)
class JobState:
    """One job, as `scontrol show job -o` shows it.

    Attributes:
        restarts: how often Slurm has requeued it.
        reason: why it waits, or why it ended.
        start: expected start of a pending job, as "2026-11-30T01:44:19"; "" if unknown.
        exit: exit code and signal of the batch script, as "3:0".
    """

    id: str
    state: str
    reason: str = ""
    restarts: int = 0
    partition: str = ""
    start: str = ""
    exit: str = ""
    comment: str = ""

    @property
    def ended(self) -> bool:
        return self.state in FINAL

    @property
    def waiting(self) -> bool:
        return self.state in ("PENDING", "CONFIGURING")


def parse_job(text: str) -> JobState | None:
    """The job of `scontrol show job -o ID`; None if Slurm does not know it (any more).

    Raises:
        ValueError: the text is neither, such as the message of a controller that does not answer.
    """
    if "Invalid job id" in text:
        return None
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z/]+)=(\S*)", text))
    if "JobId" not in fields or "JobState" not in fields:
        raise ValueError(text.strip()[-500:] or "no answer")
    start = fields.get("StartTime", "")
    return JobState(
        id=fields["JobId"],
        state=fields["JobState"],
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", "0")),
        partition=fields.get("Partition", ""),
        start=start if start[:1].isdigit() else "",
        exit=fields.get("ExitCode", ""),
        comment=fields.get("Comment", ""),
    )


def live_jobs(text: str) -> list[str]:
    """Ids of the jobs that have not ended, oldest first, of `squeue -t all -o '%i|%T'`."""
    rows = [line.strip().split("|") for line in text.splitlines() if "|" in line]
    return sorted((row[0] for row in rows if row[1] not in FINAL), key=_number)


def place_in_queue(text: str, job: str) -> int | None:
    """Place of a pending job, 1 for the next one, of `squeue -t PENDING -o '%i|%Q'`.

    Slurm takes jobs by priority (%Q), and those of the same priority in the order of their ids.
    None if the job is not among them.
    """
    rows = [line.strip().split("|") for line in text.splitlines() if "|" in line]
    order = sorted((-int(row[1]), _number(row[0]), row[0]) for row in rows if row[1].isdigit())
    ids = [row[2] for row in order]
    return ids.index(job) + 1 if job in ids else None


def _number(job: str) -> int:
    found = re.match(r"\d+", job)  # "12_[0-9]" is an array
    return int(found[0]) if found else 0


def scheduler_view(job: JobState | None) -> tuple[str, str] | None:
    """Category and text of a failure, as far as Slurm knows it; None where the nodes' own reports
    say more than Slurm's FAILED or COMPLETED."""
    if job is None:
        return None
    if HELD.search(job.reason):
        return "lost", f"Slurm gave up requeueing its job ({job.reason})"
    return {
        "BOOT_FAIL": ("lost", "a node of its job did not boot"),
        "CANCELLED": (
            "cancelled",
            "its job was cancelled (scancel), not by this pipeline; run the pipeline again to go "
            "on from the last checkpoint",
        ),
        "DEADLINE": ("queue", "the deadline of its job has passed"),
        "LAUNCH_FAILED": ("lost", "Slurm could not start its job"),
        "NODE_FAIL": ("lost", "a node of its job failed"),
        "OUT_OF_MEMORY": ("oom", "a process was killed for lack of memory (Slurm: OUT_OF_MEMORY)"),
        "PREEMPTED": ("preempted", "its job was preempted"),
        "TIMEOUT": ("preempted", "its job reached the time limit"),
    }.get(job.state)


def what_next(job: JobState | None, category: str) -> Next:
    """What follows when a job has ended without all its results.

    Args:
        job: its last state; None if Slurm has forgotten it.
        category: of the failure.

    Returns:
        "continue": submit it again, which resumes from the last checkpoint; counts as a restart.
        "restart": the same, after another pipeline that shared the job was stopped.
        "fail": report the failure.
    """
    if job is not None and job.state == "CANCELLED":
        return "restart" if job.comment == STOPPED else "fail"
    if category not in ("lost", "preempted"):
        return "fail"
    if job is not None and (job.state in INTERRUPTED or HELD.search(job.reason)):
        return "continue"
    return "continue" if category == "preempted" else "fail"
