"""The fork server of a warm worker: `python -m flows.warm.server SOCKET`.

It imports Prefect and the flows, and forks an engine for each client that connects. It stops taking
clients when its standard input is closed, which is when its worker ends, and exits after its last
engine: a flow run outlives a worker that was killed. An engine whose client is killed is killed.

A process may only fork while it has one thread. Importing starts none; whatever runs a flow, and
with it Prefect's threads, is in the forked process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.system.processes import die_with_parent

PRELOADED = (
    "prefect.flow_engine", "prefect.task_engine", "prefect._internal.metrics",
    "prefect.deployments.steps.core", "flows.job", "flows.rlhf", "flows.retrain",
    "flows.watch_data",
)  # fmt: skip
# What the imported modules have read already: an engine with other values is started anew.
READ_AT_IMPORT = ("PREFECT_", "PYTHON", "RLHF_")
ITS_OWN = ("PREFECT__",)  # Prefect's variables of one flow run


@dataclass
class Engine:
    pid: int
    pidfd: int
    client: socket.socket


class Server:
    """Forks engines, and passes signals and exit codes between them and their clients."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engines: dict[int, Engine] = {}  # descriptor of a client or of a process -> engine
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(0, selectors.EVENT_READ)
        self._open = True

    def serve(self) -> dict[str, str] | None:
        """Serve until the worker and all engines have ended: None. In an engine's process: its
        environment."""
        while self._open or self.engines:
            for key, _ in self._selector.select():
                if key.fd == 0:
                    self._close()
                elif key.fileobj is self._listener:
                    if self._open and (environment := self._accept()) is not None:
                        return environment
                elif (engine := self.engines.get(key.fd)) is not None:
                    if key.fd == engine.pidfd:
                        self._ended(engine)
                    else:
                        self._pass_signal(engine)
        return None

    def _close(self) -> None:
        self._open = False
        for source in (0, self._listener):
            self._selector.unregister(source)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the worker deletes it, unless it was killed
            self.path.parent.rmdir()

    def _accept(self) -> dict[str, str] | None:
        client, _ = self._listener.accept()
        _, passed, *_ = socket.recv_fds(client, 1, 4)
        if len(passed) < 4:  # it has ended meanwhile
            client.close()
            return None
        with open(passed[0], encoding="utf-8") as file:
            request = json.load(file)
        environment: dict[str, str] = request["environment"]
        engine = None
        if _read(environment) == _read(dict(os.environ)) and threading.active_count() == 1:
            with contextlib.suppress(OSError):  # no memory, or too many processes or open files
                engine = _fork(client)
        if engine is not None and engine.pid == 0:
            self._become(client, passed[1:], request["folder"])
            return environment
        if engine is not None:
            for descriptor in (engine.pidfd, client.fileno()):
                self.engines[descriptor] = engine
                self._selector.register(descriptor, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # it was killed
            client.sendall(b"%d\n" % (engine.pid if engine is not None else 0))
        for descriptor in passed[1:]:
            os.close(descriptor)
        return None

    def _become(self, client: socket.socket, streams: list[int], folder: str) -> None:
        """In the forked process: let go of all that is the server's."""
        os.setsid()
        die_with_parent(signal.SIGTERM)  # the server goes on after its worker, for its engines
        self._selector.close()
        self._listener.close()
        client.close()
        for descriptor in self.engines:
            os.close(descriptor)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)

    def _pass_signal(self, engine: Engine) -> None:
        numbers = b""
        with contextlib.suppress(OSError):
            numbers = engine.client.recv(100)
        with contextlib.suppress(ProcessLookupError):
            if not numbers:  # the client was killed
                self._selector.unregister(engine.client)
                del self.engines[engine.client.fileno()]
                engine.client.close()
                os.kill(engine.pid, signal.SIGKILL)
            for number in numbers.split():
                os.kill(engine.pid, int(number))

    def _ended(self, engine: Engine) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(engine.pid, 0)[1])
        self._selector.unregister(engine.pidfd)
        del self.engines[engine.pidfd]
        os.close(engine.pidfd)
        if engine.client.fileno() in self.engines:
            with contextlib.suppress(OSError):
                engine.client.sendall(b"%d\n" % code)
            self._selector.unregister(engine.client)
            del self.engines[engine.client.fileno()]
            engine.client.close()


def _fork(client: socket.socket) -> Engine:
    """The engine of a client, in whose own process its id is 0. Raises OSError."""
    if (pid := os.fork()) == 0:
        return Engine(0, -1, client)
    try:
        return Engine(pid, os.pidfd_open(pid), client)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _read(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and not name.startswith(ITS_OWN)
    }


def main(path: Path) -> None:
    """Entry point of the server, and of every engine."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    server = Server(path)  # clients that come early wait
    for name in PRELOADED:
        importlib.import_module(name)
    environment = server.serve()
    if environment is None:
        return
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    sys.argv = ["prefect.engine"]
    sys.path[0] = ""  # as for `python -m`: the folder
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
