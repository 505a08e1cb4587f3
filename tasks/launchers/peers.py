"""Agents watch each other: one connection from each node to node 0, which carries nothing.

When a rank dies, the kernel closes its connections, and the ranks of other nodes fail at once. When
a machine or its network dies, nobody closes anything: gloo and NCCL wait for `collective_timeout`,
half an hour. TCP's keepalive notices such a machine after KEEPALIVE_SECONDS.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from rlhf_core.errors import JobFailed

JOIN_SECONDS = 900.0  # for all nodes to be there: one may still pull its image
IDLE, INTERVAL, PROBES = 10, 5, 4
KEEPALIVE_SECONDS = IDLE + INTERVAL * PROBES
GRACE_SECONDS = 30.0  # for the ranks to say themselves what happened, before they are stopped
BYE = b"."


class Peers:
    """The other nodes of a launch; node 0 watches all, the others node 0.

    Attributes:
        lost: the first node that went away without a word; None while there is none.
    """

    def __init__(self, rank: int, on_loss: Callable[[], None]) -> None:
        """Args:
        rank: of this node.
        on_loss: is called from a thread, GRACE_SECONDS after a node was lost.
        """
        self.rank, self._on_loss = rank, on_loss
        self.lost: int | None = None
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._connections: dict[int, socket.socket] = {}  # node -> to it
        self._listener: socket.socket | None = None

    def serve(self, address: str) -> int:
        """Node 0: listen for the others; returns the port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return int(self._listener.getsockname()[1])

    def wait(self, nodes: int) -> None:
        """Node 0: wait for all others.

        Raises:
            JobFailed: some did not come in time.
        """
        with self._changed:
            if self._changed.wait_for(lambda: len(self._connections) == nodes - 1, JOIN_SECONDS):
                return
            missing = sorted(set(range(1, nodes)) - set(self._connections))
        names = ", ".join(map(str, missing))
        raise JobFailed(f"nodes {names} did not come within {JOIN_SECONDS:.0f} s", "lost")

    def join(self, address: str, port: int) -> None:
        """Another node: tell node 0 that this one is there, and watch it.

        Raises:
            JobFailed: node 0 does not answer.
        """
        try:
            connection = socket.create_connection((address, port), timeout=IDLE)
            connection.sendall(f"{self.rank}\n".encode())
        except OSError as error:
            raise JobFailed(
                f"node 0 does not answer at {address}, port {port}: {error}", "lost"
            ) from error
        self._keep(connection, 0)

    def close(self, done: bool) -> None:
        """End the watch.

        Args:
            done: this node's ranks have done their work; else the others take it for lost.
        """
        self._closed.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread that waits there
            self._listener.close()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                if done:
                    connection.sendall(BYE)
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = listener.accept()
                connection.settimeout(IDLE)
                with connection.makefile("rb") as stream:
                    node = int(stream.readline(16))
            except (OSError, ValueError):  # closed, or somebody else's connection
                continue
            self._keep(connection, node)

    def _keep(self, connection: socket.socket, node: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES),
        ):  # fmt: skip
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with self._changed:
            self._connections[node] = connection
            self._changed.notify_all()
        threading.Thread(target=self._watch, args=(connection, node), daemon=True).start()

    def _watch(self, connection: socket.socket, node: int) -> None:
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said == BYE or self._closed.is_set():
            return
        self.lost = node if self.lost is None else self.lost
        if not self._closed.wait(GRACE_SECONDS):
            self._on_loss()
