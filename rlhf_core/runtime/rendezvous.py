"""A rendezvous of one machine, which listens on 127.0.0.1 alone.

    python -m rlhf_core.runtime.rendezvous ARGUMENTS     torchrun's command with this backend

torchrun's own backends start a TCPStore that listens on every address of the machine, whatever
their endpoint is. Ranks find each other through that store, and it asks nobody who they are: who
reaches the port can send the ranks elsewhere, or end the run.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "rlhf-loopback"
ADDRESS = "127.0.0.1"
TIMEOUT = timedelta(seconds=60)  # of a store operation, as in torchrun's backends


class Rendezvous(RendezvousHandler):
    """One agent, which hosts the store for its ranks."""

    def __init__(self, params: RendezvousParameters) -> None:
        self.run_id = params.run_id
        with socket.create_server((ADDRESS, 0)) as listener:
            self.port: int = listener.getsockname()[1]
            self.store = TCPStore(
                ADDRESS, self.port, is_master=True, timeout=TIMEOUT, wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The agent is alone: rank 0 of 1."""
        place = RendezvousStoreInfo(ADDRESS, self.port)
        return RendezvousInfo(PrefixStore(self.run_id, self.store), 0, 1, place)

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


if __name__ == "__main__":
    from torch.distributed.run import main

    register()
    main()
