"""Machines for launches over several nodes: network namespaces joined by a cable (veth).

They share this machine's processors, disk and clock, and nothing of its network. Needs root and
iproute2; without them the tests are skipped.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlhf_core.runtime.launches import read_reports, write_jobs
from tasks.launchers.command import agent_command
from tests import forked
from tests.faults.stage import Place, make_inputs
from tests.forked import ROOT

HANGS = 1200.0  # seconds; a busy machine may need many minutes


class Machine:
    """One network namespace with an interface eth0."""

    def __init__(self, number: int) -> None:
        self.name = f"rlhf-{os.getpid()}-{number}"
        self.address = f"10.77.0.{number + 1}"
        self.number = number

    def start(self, command: Sequence[str], output: Path, **environment: str) -> forked.Process:
        """Run an agent on it, under a host name of its own. It is forked from a process that has
        imported what it needs, and enters the namespace first, see `tests.cluster.agent`."""
        output.touch()
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment,
            "RLHF_TEST_MACHINE": f"{self.name} node{self.number}",
        }  # fmt: skip
        return forked.start(*command[1:], cwd=ROOT, env=env, needs=forked.MODELS, output=output)

    def processes(self) -> list[int]:
        found = ip("netns", "pids", self.name).split()
        return [int(pid) for pid in found]

    def kill(self) -> None:
        """As if its power were cut, except that the kernel closes the connections."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Without its cable while the block runs: nobody is told, and no connection is closed."""
        ip("-n", self.name, "link", "set", "eth0", "down")
        try:
            yield
        finally:
            ip("-n", self.name, "link", "set", "eth0", "up")

    def listening(self) -> set[str]:
        """The addresses on which its processes listen."""
        found = set()
        for version, size in (("tcp", 8), ("tcp6", 32)):
            lines = Path(f"/proc/{self.processes()[0]}/net/{version}").read_text().splitlines()
            for line in lines[1:]:
                local, _, state = line.split()[1:4]
                if state == "0A":
                    words = bytes.fromhex(local[:size])
                    parts = [words[i : i + 4][::-1] for i in range(0, len(words), 4)]
                    found.add(str(ipaddress.ip_address(b"".join(parts))))
        return found


class Cluster:
    """Some machines with one artifact store."""

    def __init__(self, machines: Sequence[Machine], place: Place) -> None:
        self.machines, self.place = machines, place
        self.folder = place.folder
        self.attempts = 0

    def start(
        self, jobs: Sequence, nodes: int = 2, faults: Sequence[dict] = ()
    ) -> list[forked.Process]:
        """Start one attempt: an agent on each machine."""
        self.attempts += 1
        self.nodes, self.launch = nodes, write_jobs(self.place.store, "stage", jobs)
        started = []
        for machine in self.machines[:nodes]:
            command = agent_command(
                self.place.url, self.launch, self.attempt, nodes, machine.number,
                f"{self.machines[0].address}:{29400 + self.attempts}",
                scratch=str(self.folder / f"scratch-{machine.number}"),
            )  # fmt: skip
            command[command.index("tasks.launchers.node_agent")] = "tests.cluster.agent"
            process = machine.start(
                command, self.output(machine.number),
                RLHF_HOME=str(self.folder / f"home-{machine.number}"),
                RLHF_TEST_FAULTS=json.dumps(list(faults)),
            )  # fmt: skip
            started.append(process)
        return started

    def run(self, jobs: Sequence, nodes: int = 2, faults: Sequence[dict] = ()) -> list[int]:
        """Run one attempt to its end; the agents' exit codes."""
        return self.wait(self.start(jobs, nodes, faults))

    def wait(self, started: Sequence[forked.Process], seconds: float = HANGS) -> list[int]:
        """Wait for the agents and for all other processes."""
        end = time.monotonic() + seconds
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in started]
        while any(machine.processes() for machine in self.machines):
            assert time.monotonic() < end, "processes are left"
            time.sleep(0.1)
        return codes

    @property
    def attempt(self) -> str:
        return f"try-{self.attempts}"

    def output(self, node: int) -> Path:
        return self.folder / f"{self.attempt}-node-{node}.txt"

    def said(self) -> str:
        return "\n".join(self.output(node).read_text()[-4000:] for node in range(self.nodes))

    def reports(self):
        return read_reports(self.place.store, self.launch, self.attempt, self.nodes)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="session")
def machines():
    """Two machines with a cable between them."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("no command ip (Debian: iproute2)")
    made = [Machine(0), Machine(1)]
    try:
        try:
            for machine in made:
                ip("netns", "add", machine.name)
            first, second = (machine.name for machine in made)
            ip(*f"link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
            for machine in made:
                ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    ip("-n", machine.name, "link", "set", link, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        for machine in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                machine.kill()
                ip("netns", "del", machine.name)


@pytest.fixture(scope="session")
def inputs(once):
    """A folder with a store, and the digests of a tiny model and its data."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RLHF_HOME", str(folder / "home"))
            return make_inputs(folder)

    return once("cluster", make)


@pytest.fixture
def cluster(machines, inputs, tmp_path):
    made = Cluster(machines, Place(inputs[0], tmp_path / "place"))
    yield made
    for machine in machines:
        machine.kill()
