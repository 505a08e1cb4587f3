"""A rendezvous of machines that know their places, which listens on one address alone.

    python -m rlhf_core.runtime.rendezvous ARGUMENTS     torchrun's command with this backend

torchrun's own backends start a TCPStore that listens on every address of the machine, whatever
their endpoint is. Ranks find each other through that store, and it asks nobody who they are: who
reaches the port can send the ranks elsewhere, or end the run. Here it listens on 127.0.0.1 where a
launch has one machine, else on the address of node 0 that the endpoint names.

Its order of nodes is the given one, so that rank 0 is on node 0. c10d's follows from the addresses.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from datetime import timedelta
from types import FrameType

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "rlhf-static"
ADDRESS = "127.0.0.1"
TIMEOUT = timedelta(seconds=60)  # of a store operation, as in torchrun's backends
JOIN_TIMEOUT = timedelta(seconds=900)  # for all nodes to be there: one may still pull its image
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Rendezvous(RendezvousHandler):
    """One node's agent. That of node 0 hosts the store."""

    def __init__(self, params: RendezvousParameters) -> None:
        self.run_id = params.run_id
        self.nodes: int = params.max_nodes
        self.rank = int(params.config.get("node_rank", 0))
        host, _, port = params.endpoint.rpartition(":")
        self.address, self.port = (host, int(port)) if host else (params.endpoint, 0)
        if self.rank == 0:
            self.store = self._serve()
        else:
            self.store = TCPStore(
                self.address, self.port, is_master=False, timeout=JOIN_TIMEOUT,
                wait_for_workers=False,
            )  # fmt: skip
        self.store.set_timeout(TIMEOUT)

    def _serve(self) -> TCPStore:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.create_server((self.address, self.port), family=family) as listener:
            self.port = listener.getsockname()[1]
            return TCPStore(
                self.address, self.port, is_master=True, timeout=JOIN_TIMEOUT,
                wait_for_workers=False, master_listen_fd=listener.detach(),
            )  # fmt: skip

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes.

        Raises:
            DistStoreError: one did not come in time.
        """
        store = PrefixStore(self.run_id, self.store)
        store.set(f"node/{self.rank}", b"here")
        store.wait([f"node/{node}" for node in range(self.nodes)], JOIN_TIMEOUT)
        place = RendezvousStoreInfo(self.address, self.port)
        return RendezvousInfo(store, self.rank, self.nodes, place)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Make BACKEND known to torchrun. Idempotent."""
    rendezvous_handler_registry.register(BACKEND, Rendezvous)


def stop_once() -> None:
    """Let torchrun in this process handle the first signal to stop, and ignore further ones.

    It passes a signal on and waits for its ranks. The second one would make it start over, and the
    third leave them to be killed; Slurm sends one to every process of a job, which is then one more
    than those that the parents pass on.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        name = signal.Signals(number)
        raise api.SignalException(f"Process {os.getpid()} got signal: {name}", sigval=name)

    for number in SIGNALS:
        signal.signal(number, stop)
    api._terminate_process_handler = stop  # torchrun installs it when it starts its ranks


def main() -> None:
    """torchrun's command."""
    from torch.distributed.run import main as torchrun

    register()
    stop_once()
    torchrun(["--rdzv-backend", BACKEND, "--max-restarts", "0", *sys.argv[1:]])


if __name__ == "__main__":
    main()
