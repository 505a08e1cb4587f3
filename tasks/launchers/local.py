"""The `local` launcher: torchrun as a child of the flow's process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from rlhf_core.jobs import Job
from rlhf_core.system.cpus import cpu_cores
from rlhf_core.system.processes import die_with_parent, python_path
from rlhf_core.system.secrets import hide
from tasks.launchers import fork_client
from tasks.launchers.base import Launch, LineSink, Outcome, ProgressSink
from tasks.launchers.devices import reserved
from tasks.launchers.failures import DeadRank, diagnose
from tasks.launchers.processes import ProcessTree
from tasks.launchers.usage import Memory, table

# Run as `python -m MODULE FOLDER/job.json`, and as MODULE.main([...]) in ranks that are forked;
# tests put a stand-in here.
MODULE = "rlhf_core.__main__"
POLL_SECONDS = 0.25
USAGE_SECONDS = 10.0  # between two looks at what the ranks use
LOOK_SECONDS = 2.0  # between two looks at the descendants
KILL_SECONDS = 1.0  # that ranks have to end after the time that they were given
# torchrun's own lines ("W1122 10:00:00.000000 4242 torch/distributed/..."); its report of a failed
# rank starts with one of level E and runs to the end.
TORCHRUN = re.compile(r"^\[?([WEIC])\d{4} .*torch/(distributed|elastic|_)")


KEPT_IN_STORE = ("scratch", "checkpoint", "resume")  # big, and what counts of it is in the store


class LocalTorchrun:
    """Runs a launch on this machine; torchrun stays in the flow's process group."""

    def __init__(self, patience: float | None = None) -> None:
        """Args:
        patience: seconds between SIGTERM and SIGKILL when a run is stopped; None: what the job
            gives its ranks, and a little more.
        """
        self.patience = patience

    def prepare(self) -> None:
        """See `Launcher.prepare`. Imports what stages need, beside what this process does."""
        fork_client.warm(MODULE, surroundings())

    def run(self, launch: Launch, on_line: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """See `Launcher.run`. The job folders stay, without what is big in them."""
        for folder, job in launch.jobs.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job.json").write_text(job.model_dump_json(indent=1))
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        jobs = list(launch.jobs.values())
        with self._devices(launch.name, jobs, on_line) as devices:
            return self._run(launch, jobs, devices, on_line, on_progress)

    def _devices(
        self, name: str, jobs: list[Job], say: LineSink
    ) -> contextlib.AbstractContextManager[list[str]]:
        """The devices of a job's ranks, one each; none for one that takes none."""
        placement = jobs[0].placement()
        if not jobs[0].torchrun or placement.device == "cpu":
            return contextlib.nullcontext([])
        return reserved(placement.ranks, name, say)

    def _run(
        self,
        launch: Launch,
        jobs: list[Job],
        devices: list[str],
        on_line: LineSink,
        on_progress: ProgressSink,
    ) -> list[Outcome]:
        files = [folder / "job.json" for folder in launch.jobs]
        process = start(jobs, files, launch.store, devices)
        tree, memory = ProcessTree(process), Memory()
        reader = _Reader(process, launch.log, on_line)
        try:
            reader.start()
            names = ("samples.jsonl", "metrics.jsonl")
            tails = [_Tail(folder / name) for folder in launch.jobs for name in names]
            self._watch(tree, memory, tails, on_progress)
        except BaseException:  # a cancelled run raises TerminationSignal, Ctrl-C KeyboardInterrupt
            on_line("stopping the processes of this stage")
            reader.hidden = True  # what they say about being stopped is in the log file
            raise
        finally:
            tree.end(self._patience(jobs) if process.returncode is None else 0.0)
            reader.join(5)
            for folder in launch.jobs:
                for inner in KEPT_IN_STORE:
                    shutil.rmtree(folder / inner, ignore_errors=True)
        outcomes = [_outcome(folder) for folder in launch.jobs]
        if None in outcomes:  # else all is in the store, whatever ended the processes then
            raise diagnose(
                launch.name, launch.jobs, process.wait(), reader.dead_rank, launch.log,
                stopped=reader.stopped, out_of_memory=memory.killed(),
            )  # fmt: skip
        return [outcome for outcome in outcomes if outcome is not None]

    def _patience(self, jobs: list[Job]) -> float:
        if self.patience is not None:
            return self.patience
        return max(job.placement().stop_timeout for job in jobs) + KILL_SECONDS

    def _watch(
        self, tree: ProcessTree, memory: Memory, tails: list[_Tail], on_progress: ProgressSink
    ) -> None:
        running, looked, asked = True, 0.0, time.monotonic()
        while running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                tree.process.wait(POLL_SECONDS)
            running = tree.process.returncode is None
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                tree.look()
            memory.look(tree.living())
            if time.monotonic() - asked > USAGE_SECONDS:
                asked = time.monotonic()
                if usage := table(tree.living()):
                    on_progress({"usage": usage})
            for tail in tails:
                if (newest := tail.newest()) is not None:
                    on_progress(newest)


def start(
    jobs: list[Job], files: list[Path], store: str, devices: Sequence[str] = ()
) -> subprocess.Popen[bytes] | fork_client.Forked:
    """The process of a launch: torchrun's agent, or the only rank. It ends if this one does."""
    variables = environment(jobs, store, devices)
    if not devices:
        ranks = jobs[0].placement().ranks if jobs[0].torchrun else 0
        forked = fork_client.fork(ranks, MODULE, [str(file) for file in files], variables)
        if forked is not None:
            return forked
    return subprocess.Popen(
        command(jobs, files, devices),
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # in the child itself: if this process is killed, torchrun ends its ranks
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )


def command(jobs: list[Job], files: list[Path], devices: Sequence[str] = ()) -> list[str]:
    """The command line of a process that is not forked; the rendezvous is on the loopback address,
    at a port of its own choice.

    Args:
        devices: GPUs of the ranks. Without any, torchrun's agent forks its ranks.
    """
    ranks, names = str(jobs[0].placement().ranks), [str(file) for file in files]
    if not jobs[0].torchrun:
        return [sys.executable, "-m", MODULE, *names]
    if not devices:
        return [sys.executable, "-m", "rlhf_core.runtime.torchrun", ranks, MODULE, *names]
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", ranks,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        "--rdzv-id", uuid.uuid4().hex, "--local-addr", "127.0.0.1", "-m", MODULE, *names,
    ]  # fmt: skip


# Threads that spin cost a factor of 7 on shared cores, and threads that go to sleep at once a
# fifth of the time of small models: they spin for some 20 microseconds, then they sleep.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


def environment(jobs: list[Job], store: str, devices: Sequence[str] = ()) -> dict[str, str]:
    """Of a launch's processes."""
    placement = jobs[0].placement()
    ranks = placement.ranks if jobs[0].torchrun else 1
    threads = placement.threads or max(1, cpu_cores() // ranks)
    return {
        **surroundings(),
        "OMP_NUM_THREADS": str(threads),
        "RLHF_STORE": store,
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
    }


def surroundings() -> dict[str, str]:
    """This process's environment, and what all ranks need; what the user has set stays."""
    quiet = {
        **WAITING,
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",  # one machine: no look-up of a host name that may not resolve
    }
    return {**quiet, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path()}


def _outcome(folder: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads((folder / "result.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


class _Reader(threading.Thread):
    """Copies the ranks' output to a file and, but for torchrun's own reports, to a sink."""

    def __init__(
        self, process: subprocess.Popen[bytes] | fork_client.Forked, log: Path, on_line: LineSink
    ) -> None:
        super().__init__(name=f"output of {process.pid}", daemon=True)
        self.process, self.log, self.on_line = process, log, on_line
        self._dead = DeadRank()
        self.hidden = False

    def run(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("a", encoding="utf-8") as file, self.process.stdout as pipe:
            for raw in _lines(pipe):
                line = hide(raw.decode("utf-8", "replace").rstrip())
                file.write(line + "\n")
                file.flush()
                if line and not self._is_torchruns(line):
                    self.on_line(line)

    def _is_torchruns(self, line: str) -> bool:
        self._dead.see(line)
        return self.hidden or self.dead_rank is not None or TORCHRUN.match(line) is not None

    @property
    def dead_rank(self) -> tuple[int, int] | None:
        """(rank, exit code) of the rank whose death ended the job, if torchrun named one."""
        return self._dead.found

    @property
    def stopped(self) -> bool:
        """Whether torchrun was told to stop."""
        return self._dead.stopped


def _lines(pipe: IO[bytes]) -> Any:
    """Lines, with a carriage return of a progress bar taken as a line's end."""
    for raw in pipe:
        yield raw.rstrip(b"\r\n").rpartition(b"\r")[2]


class _Tail:
    """The newest whole line of a growing JSONL file."""

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
        whole = data.rpartition(b"\n")[0]
        if not whole:
            return None
        self.offset += len(whole) + 1
        with contextlib.suppress(ValueError):
            value = json.loads(whole.rpartition(b"\n")[2])
            return value if isinstance(value, dict) else None
        return None
