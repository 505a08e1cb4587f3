"""The `local` launcher: it runs torchrun as a child of the flow's process."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Job
from rlhf_core.system.processes import die_with_parent
from rlhf_core.system.secrets import redact
from tasks.launchers import fork_client
from tasks.launchers.base import Launch, LineSink, Outcome, ProgressSink
from tasks.launchers.command import ALONE, Node, base_environment, environment, torchrun_command
from tasks.launchers.devices import devices, reserved
from tasks.launchers.failures import DeadRank, diagnose
from tasks.launchers.processes import ProcessTree
from tasks.launchers.usage import Memory, table

MODULE = "rlhf_core.__main__"  # see `torchrun_command`; tests put a stub here
POLL_SECONDS = 0.25
USAGE_SECONDS = 10.0  # between two reports of the ranks' usage
REFRESH_SECONDS = 2.0  # between two searches for descendants
KILL_SECONDS = 1.0  # after a job's stop_timeout, before SIGKILL
# torchrun's own lines ("W1122 10:00:00.000000 4242 torch/distributed/..."). Its report of a failed
# rank starts with such a line of level E and is the last of the output.
TORCHRUN = re.compile(r"^\[?([WEIC])\d{4} .*torch/(distributed|elastic|multiprocessing|_)")


DELETED_AFTERWARDS = ("scratch", "checkpoint", "resume")  # large; results are in the store


class LocalTorchrun:
    """Runs a launch on this machine; torchrun stays in the flow's process group."""

    def __init__(self, grace_seconds: float | None = None, node: Node | None = None) -> None:
        """Args:
        grace_seconds: between SIGTERM and SIGKILL when a run is stopped; None: the job's
            stop_timeout and a little more.
        node: this machine, where a scheduler has given it to the launch; None: other launches
            run here too, and each reserves its GPUs.
        """
        self.grace_seconds = grace_seconds
        self.scheduled = node is not None
        self.node = node or ALONE

    def prepare(self) -> None:
        """See `Launcher.prepare`. Starts the fork server, which imports what stages need."""
        fork_client.preload(MODULE, base_environment())

    def run(self, launch: Launch, on_output: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """See `Launcher.run`. Job folders are kept, except for their large contents.

        Returns:
            The outcomes; none where they are another node's.

        Raises:
            ConfigError: the jobs need more nodes.
        """
        self._check_nodes(launch.name, next(iter(launch.jobs.values())))
        for folder, job in launch.jobs.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job.json").write_text(job.model_dump_json(indent=1))
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        jobs = list(launch.jobs.values())
        with self._devices(launch.name, jobs, on_output) as devices:
            return self._run(launch, jobs, devices, on_output, on_progress)

    def _check_nodes(self, name: str, job: Job) -> None:
        needed, count = job.placement().nodes if job.torchrun else 1, self.node.count
        if needed != count:
            raise ConfigError(
                f"{name}.resources.nodes is {needed}, but this launch has {count} "
                f"machine{'s' if count > 1 else ''}; set nodes to {count}, or use a launcher of a "
                "cluster (slurm, kubernetes)"
            )

    def _devices(
        self, name: str, jobs: list[Job], report: LineSink
    ) -> contextlib.AbstractContextManager[list[str]]:
        """One device per rank and sampler; none for a job that runs on the CPU."""
        placement = jobs[0].placement()
        needed = placement.ranks + max(job.samplers for job in jobs)
        if not jobs[0].torchrun or placement.device == "cpu":
            return contextlib.nullcontext([])
        if self.scheduled:
            return contextlib.nullcontext(devices()[:needed])
        return reserved(needed, name, report)

    def _run(
        self,
        launch: Launch,
        jobs: list[Job],
        devices: list[str],
        on_output: LineSink,
        on_progress: ProgressSink,
    ) -> list[Outcome]:
        files = [folder / "job.json" for folder in launch.jobs]
        process = start(jobs, files, launch.store, devices, self.node)
        tree, memory = ProcessTree(process), Memory()
        reader = _Reader(process, launch.log, on_output)
        try:
            reader.start()
            names = ("samples.jsonl", "metrics.jsonl")
            tails = [_Tail(folder / name) for folder in launch.jobs for name in names]
            self._watch(tree, memory, tails, on_progress)
        except BaseException:  # a cancelled run raises TerminationSignal, Ctrl-C KeyboardInterrupt
            on_output("stopping the processes of this stage")
            reader.hidden = True  # their messages about being stopped go to the log file only
            raise
        finally:
            tree.terminate(self._grace_seconds(jobs) if process.returncode is None else 0.0)
            reader.join(5)
            for folder in launch.jobs:
                for inner in DELETED_AFTERWARDS:
                    shutil.rmtree(folder / inner, ignore_errors=True)
        if self.node.rank > 0 and process.wait() == 0:
            return []
        outcomes = [_outcome(folder) for folder in launch.jobs]
        if None in outcomes:  # else all results are in the store, and the exit does not matter
            raise diagnose(
                launch.name, launch.jobs, process.wait(), reader.dead_rank, launch.log,
                stopped=reader.stopped, out_of_memory=memory.oom_report(),
            )  # fmt: skip
        return [outcome for outcome in outcomes if outcome is not None]

    def _grace_seconds(self, jobs: list[Job]) -> float:
        if self.grace_seconds is not None:
            return self.grace_seconds
        return max(job.placement().stop_timeout for job in jobs) + KILL_SECONDS

    def _watch(
        self, tree: ProcessTree, memory: Memory, tails: list[_Tail], on_progress: ProgressSink
    ) -> None:
        running, refreshed, reported = True, 0.0, time.monotonic()
        while running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                tree.process.wait(POLL_SECONDS)
            running = tree.process.returncode is None
            if time.monotonic() - refreshed > REFRESH_SECONDS:
                refreshed = time.monotonic()
                tree.refresh()
            memory.sample(tree.alive())
            if time.monotonic() - reported > USAGE_SECONDS:
                reported = time.monotonic()
                if usage := table(tree.alive()):
                    on_progress({"usage": usage})
            for tail in tails:
                if (newest := tail.newest()) is not None:
                    on_progress(newest)


def start(
    jobs: list[Job],
    files: list[Path],
    store: str,
    devices: Sequence[str] = (),
    node: Node = ALONE,
) -> subprocess.Popen[bytes] | fork_client.Forked:
    """Start a launch: torchrun's agent, or the only rank. It ends when this process ends."""
    variables = environment(jobs, store, devices, node)
    if not devices and node.count == 1:
        ranks = jobs[0].placement().ranks if jobs[0].torchrun else 0
        forked = fork_client.fork(ranks, MODULE, [str(file) for file in files], variables)
        if forked is not None:
            return forked
    return subprocess.Popen(
        torchrun_command(MODULE, jobs, files, devices, node),
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # in the child itself: if this process is killed, torchrun ends its ranks
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )


def _outcome(folder: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads((folder / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


class _Reader(threading.Thread):
    """Copies the ranks' output to a file and, except for torchrun's reports, to a callback."""

    def __init__(
        self, process: subprocess.Popen[bytes] | fork_client.Forked, log: Path, on_output: LineSink
    ) -> None:
        super().__init__(name=f"output of {process.pid}", daemon=True)
        self.process, self.log, self.on_output = process, log, on_output
        self._dead = DeadRank()
        self.hidden = False

    def run(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("a", encoding="utf-8") as file, self.process.stdout as pipe:
            for raw in _lines(pipe):
                line = redact(raw.decode("utf-8", "replace").rstrip())
                file.write(line + "\n")
                file.flush()
                if line and not self._is_from_torchrun(line):
                    self.on_output(line)

    def _is_from_torchrun(self, line: str) -> bool:
        self._dead.feed(line)
        return self.hidden or self.dead_rank is not None or TORCHRUN.match(line) is not None

    @property
    def dead_rank(self) -> tuple[int, int] | None:
        """(rank, exit code) of the rank that died first, if torchrun named one."""
        return self._dead.found

    @property
    def stopped(self) -> bool:
        """Whether torchrun got a signal to stop."""
        return self._dead.stopped


def _lines(pipe: IO[bytes]) -> Any:
    """Lines; of a line with carriage returns (a progress bar) only the last part."""
    for raw in pipe:
        yield raw.rstrip(b"\r\n").rpartition(b"\r")[2]


class _Tail:
    """Reads the newest complete line of a growing JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def newest(self) -> dict[str, Any] | None:
        """The newest line since the last call, or None."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return None
        complete = data.rpartition(b"\n")[0]
        if not complete:
            return None
        self.offset += len(complete) + 1
        with contextlib.suppress(ValueError):
            value = json.loads(complete.rpartition(b"\n")[2])
            return value if isinstance(value, dict) else None
        return None
