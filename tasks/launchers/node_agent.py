"""Runs one node's part of a launch: `python -m tasks.launchers.node_agent OPTIONS`.

A scheduler starts one agent on each node. It reads the jobs from the store, starts torchrun, prints
the ranks' output (and on node 0 progress, see `remote_output`), and writes to the store how its
node fared. SIGTERM is passed to the ranks, which store a checkpoint. The exit codes are those of
`rlhf_core.runtime.launches`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_core.errors import ConfigError, JobFailed, RLHFError, StoreError, StoreUnavailable
from rlhf_core.jobs import Job
from rlhf_core.preflight.settings import check_placement
from rlhf_core.runtime.launches import (
    CONSEQUENCE,
    NodeReport,
    exit_code,
    read_jobs,
    read_reports,
    write_report,
)
from rlhf_core.runtime.uploads import retry_while_unavailable
from rlhf_core.store import Store, open_store
from rlhf_core.system.machine import this_machine
from rlhf_core.system.private import private_folder
from rlhf_core.system.secrets import redact
from tasks.launchers.base import Launch
from tasks.launchers.command import ALONE, Node
from tasks.launchers.failures import RanksFailed, diagnose
from tasks.launchers.local import LocalTorchrun
from tasks.launchers.network import resolved, way_to
from tasks.launchers.outcome import results
from tasks.launchers.peers import JOIN_SECONDS, Peers
from tasks.launchers.remote_output import progress_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NAME_SECONDS = 300.0  # within which the name of node 0 becomes known
STORE_SECONDS = 300.0  # for which an unreachable store is asked again
POLL_SECONDS = 0.5
PROGRESS_SECONDS = 2.0  # between two lines of progress of a kind


class Stopped(BaseException):
    """This process got a signal to stop."""


@contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """In the block the first SIGTERM or SIGINT raises Stopped. Further ones are ignored: the ranks
    are storing a checkpoint. A scheduler that wants more has SIGKILL.

    Yields:
        A function from which on all are ignored.
    """

    def ignore() -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)

    def stop(number: int, frame: FrameType | None) -> None:
        ignore()
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Prints the newest progress of each kind, not more often than every PROGRESS_SECONDS; a no-op
    except on node 0, whose table of usage would else take turns with those of others."""

    def __init__(self, node: int) -> None:
        self.node = node
        self._waiting: dict[str, dict[str, Any]] = {}
        self._printed: dict[str, float] = {}

    def __call__(self, line: dict[str, Any]) -> None:
        if self.node > 0:
            return
        kind = next((name for name in ("usage", "samples") if name in line), "step")
        self._waiting[kind] = line
        if time.monotonic() - self._printed.get(kind, 0.0) > PROGRESS_SECONDS:
            self._print(kind)

    def flush(self) -> None:
        """Print what waits."""
        for kind in list(self._waiting):
            self._print(kind)

    def _print(self, kind: str) -> None:
        self._printed[kind] = time.monotonic()
        show(progress_line(self._waiting.pop(kind)))


def show(line: str) -> None:
    """Print one line of output."""
    print(redact(line), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the node's part; returns the exit code."""
    options = _parser().parse_args(arguments)
    failure: RLHFError | None = None
    with stopping() as ignore_signals:
        try:
            agent = _Agent(options)
        except RLHFError as error:  # the store cannot be opened
            show(f"ERROR ({error.category}): {error}")
            return exit_code(error.category)
        try:
            agent.run()
        except Stopped as stop:
            failure = agent.stopped(str(stop))
        except RLHFError as error:
            failure = error
        except Exception as error:
            traceback.print_exc()
            failure = JobFailed(f"the agent failed: {type(error).__name__}: {error}", "internal")
        ignore_signals()
        agent.report(failure)
    if failure is not None:
        show(f"ERROR ({failure.category}): {failure}")
    return exit_code(failure.category if failure else None)


class _Agent:
    """One node of an attempt."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.launch_id: str = options.launch
        self.attempt: str = options.attempt
        self.rank: int = options.node_rank
        self.nodes: int = options.nodes
        self.rendezvous: str = options.rendezvous
        self.scratch = Path(options.scratch) if options.scratch else private_folder("launches")
        self.store: Store = open_store(options.store)
        self.launch: Launch | None = None
        self.peers = Peers(self.rank, self._give_up)
        self.gave_up = False

    def run(self) -> None:
        """Run the jobs.

        Raises:
            RLHFError: this node has no result.
            Stopped: a signal came.
        """
        name, jobs = retry_while_unavailable(
            lambda: read_jobs(self.store, self.launch_id), "the launch", STORE_SECONDS
        )
        self.launch = self._launch(name, jobs)
        if problems := [p for job in jobs for p in check_placement(job, this_machine())]:
            raise ConfigError("; ".join(dict.fromkeys(problems)))
        progress, done = Progress(self.rank), False
        try:
            node = self._meet()
            LocalTorchrun(node=node).run(self.launch, show, progress)
            done = True
        finally:
            progress.flush()
            self.peers.close(done)

    def _meet(self) -> Node:
        """Wait until all nodes are there."""
        running = NodeReport(node=self.rank, host=socket.gethostname())
        if self.nodes == 1:
            self._write(running)
            return ALONE
        node = self._node()
        address = node.rendezvous.rpartition(":")[0]
        if self.rank == 0:
            self._write(running.model_copy(update={"port": self.peers.serve(address)}))
            self.peers.wait(self.nodes)
            return node
        self._write(running)
        end = time.monotonic() + JOIN_SECONDS
        while True:
            first = None
            with suppress(StoreUnavailable):
                first = read_reports(self.store, self.launch_id, self.attempt, 1).get(0)
            if first is not None and first.state == "running":
                self.peers.join(address, first.port)
                return node
            if first is not None or time.monotonic() > end:
                text = "node 0 has failed" if first else f"node 0 did not come in {JOIN_SECONDS} s"
                raise RanksFailed(text, "lost", text, time.time(), CONSEQUENCE)
            time.sleep(POLL_SECONDS)

    def _launch(self, name: str, jobs: list[Job]) -> Launch:
        top = self.scratch / self.launch_id / f"{self.attempt}-node{self.rank}"
        if top.exists():
            raise ConfigError(
                f"{top} is there already: an attempt has a name of its own, and each of its nodes "
                "has one agent"
            )
        folders = [top] if len(jobs) == 1 else [top / str(i) for i in range(len(jobs))]
        return Launch(name, dict(zip(folders, jobs, strict=True)), self.store.url, top / "log.txt")

    def _node(self) -> Node:
        address, port = resolved(self.rendezvous, NAME_SECONDS)
        own, interface = way_to(address)
        if self.rank == 0 and own != address:
            raise ConfigError(
                f"the rendezvous {self.rendezvous} has the address {address}, and this node, which "
                f"is node 0, has {own}: give an address of node 0"
            )
        show(f"node {self.rank} of {self.nodes}: {own} on {interface}, node 0 at {address}:{port}")
        return Node(
            self.rank, self.nodes, f"{address}:{port}", own, interface,
            f"{self.launch_id}-{self.attempt}",
        )  # fmt: skip

    def _give_up(self) -> None:
        """Stop the ranks, which wait for those of a lost node."""
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # else they are being stopped
            self.gave_up = True
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(self, by: str) -> JobFailed | None:
        """What a signal has left: a result, an error of a rank, or a checkpoint."""
        if self.gave_up:
            text = f"node {self.peers.lost} vanished, or ended without its ranks' work being done"
            return RanksFailed(text, "lost", text, time.time(), CONSEQUENCE)
        if self.launch is None:
            return JobFailed(f"stopped by {by} before its ranks were started", "preempted")
        with suppress(StoreError):
            if results(self.launch) is not None:
                return None
        launch = self.launch
        return diagnose(launch.name, launch.jobs, 0, None, launch.log, stopped=True)

    def report(self, failure: RLHFError | None) -> None:
        """Write how it ended."""
        host = socket.gethostname()
        if failure is None:
            self._write(NodeReport(node=self.rank, host=host, state="done"))
            return
        more: dict[str, Any] = {"text": redact(str(failure)), "time": time.time()}
        if isinstance(failure, RanksFailed):
            more = {"text": failure.text, "time": failure.time, "weight": failure.weight}
        failed = NodeReport(
            node=self.rank, host=host, state="failed", category=failure.category, **more
        )
        self._write(failed)

    def _write(self, report: NodeReport) -> None:
        try:
            write_report(self.store, self.launch_id, self.attempt, report)
        except StoreError as error:  # the exit code has the category
            print(f"WARNING: the store was not told: {error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True, help="URL of the artifact store")
    parser.add_argument("--launch", required=True, help="id of the launch")
    parser.add_argument("--attempt", required=True, help="name of this start of all nodes")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument("--node-rank", type=int, required=True, help="this one, from 0")
    parser.add_argument("--rendezvous", required=True, help="HOST:PORT of node 0")
    parser.add_argument("--scratch", help="folder for job folders; below $RLHF_HOME by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
