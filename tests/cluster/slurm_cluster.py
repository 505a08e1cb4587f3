"""A Slurm cluster of three nodes on this machine: one controller, three slurmd, no munge."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from rlhf_core.system.processes import die_with_parent
from tests.rlhf_core.torchrun import HANGS, ROOT

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
NODES = ("n1", "n2", "n3")


class SlurmCluster:
    """The daemons, and what tests do to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        ports = _free_ports(2 + len(NODES))
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        template = Path(__file__).with_name("slurm.conf").read_text()
        self.conf.write_text(
            template.format(
                host=socket.gethostname().partition(".")[0], user=getpass.getuser(),
                folder=self.folder, ports=ports, last=ports[-1],
            )
        )  # fmt: skip
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self("sinfo -h -t idle -N -p main -o %N").split() == list(NODES))

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-c", "-N", node)

    def _daemon(self, name: str, *command: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.daemons[name] = subprocess.Popen(
            [shutil.which(command[0], path=path) or command[0], *command[1:]],
            env={**os.environ, "SLURM_CONF": str(self.conf)}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
        )  # fmt: skip

    def stop(self) -> None:
        """End the jobs, the daemons, and what a node that was killed has left."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self("scancel --state=PENDING; scancel --state=RUNNING")
        for process in self.daemons.values():
            process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left in self.processes():
            with contextlib.suppress(psutil.Error):
                left.kill()

    def kill_node(self, node: str) -> None:
        """As if its power were cut: its daemon and all that its jobs have started there."""
        processes = [p for p in self.processes() if _variable(p, "SLURMD_NODENAME") == node]
        steps = [p for p in psutil.process_iter() if self._is_step(p, node)]
        self.daemons[node].send_signal(signal.SIGKILL)
        for process in (*steps, *processes):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.daemons[node].wait()

    def _is_step(self, process: psutil.Process, node: str) -> bool:
        with contextlib.suppress(psutil.Error):
            if not process.name().startswith("slurmstepd"):
                return False
            return any(Path(f.path).name == f"{node}.log" for f in process.open_files())
        return False

    def processes(self) -> list[psutil.Process]:
        """What jobs of this cluster have started and still runs."""
        found = []
        for process in psutil.process_iter():
            if _variable(process, "SLURM_CONF") == str(self.conf) and _variable(
                process, "SLURM_JOB_ID"
            ):
                found.append(process)
        return found

    def __call__(self, command: str) -> str:
        """What a shell command prints."""
        done = subprocess.run(
            ["bash", "-c", command], check=True, capture_output=True, text=True,
            env={**os.environ, "SLURM_CONF": str(self.conf)},
        )  # fmt: skip
        return done.stdout

    def job_states(self) -> dict[str, str]:
        """Job id -> state, of the jobs that have not ended."""
        return dict(line.split("|") for line in self("squeue -h -o '%i|%T'").split())

    @staticmethod
    def wait(condition: Callable[[], object], seconds: float = HANGS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.1)


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def _free_ports(count: int) -> list[int]:
    """Free ports that follow one another."""
    for first in range(20_000 + os.getpid() % 5_000, 32_000, count):
        ports = range(first, first + count)
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in ports:
                opened.enter_context(socket.create_server(("127.0.0.1", port)))
            return list(ports)
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster that all tests share."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in COMMANDS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no command {', '.join(missing)} (Debian: slurm-wlm)")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def interpreter(folder: Path, module: str) -> Path:
    """An interpreter that runs another module than the node agent's."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/bash\nexport PYTHONPATH={ROOT}\nshift 2\nexec {sys.executable} -m {module} "$@"\n'
    )
    path.chmod(0o755)
    return path
