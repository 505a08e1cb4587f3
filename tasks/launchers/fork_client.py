"""Client of the fork server, from which stages on CPUs are forked, so that their modules are
imported once instead of once per stage (see `rlhf_core.runtime.fork_server`)."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

import psutil

# Prefixes of variables that libraries read when they are imported. Stages for which one of them
# differs need different fork servers. The number of threads is set in each stage.
READ_AT_IMPORT = (
    "ATEN_", "DNNL_", "GOMP_", "HF_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTHON", "TOKENIZERS_", "TORCH", "TRANSFORMERS_",
)  # fmt: skip
POLL_SECONDS = 0.1


class ForkServer:
    """A running fork server. It exits when `close` is called, or when this process exits."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.key = _key(environment)
        self.owner = os.getpid()
        self._stages: list[Forked] = []
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_core.runtime.fork_server", str(theirs.fileno())],
                env={**environment, "OMP_NUM_THREADS": "1"},  # no thread may be there at a fork
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def fork(
        self, ranks: int, module: str, files: Sequence[str], environment: dict[str, str]
    ) -> Forked | None:
        """Fork a stage and wait for its process id; None if the server has exited."""
        request = {"ranks": ranks, "module": module, "files": [*files], "environment": environment}
        output, stage_output = os.pipe()
        state, stage_state = os.pipe()
        stage = None
        try:
            try:
                self._send(request, stage_output, stage_state)
            except OSError:
                return None
            finally:
                for descriptor in (stage_output, stage_state):
                    os.close(descriptor)
            # in short waits, so that a signal can stop this thread
            while not _readable(state, POLL_SECONDS):
                pass
            if first := _line(state):
                stage = Forked(int(first), state, os.fdopen(output, "rb"))
                self._stages = [s for s in self._stages if s.poll() is None] + [stage]
            return stage
        finally:
            if stage is None:
                os.close(state)
                os.close(output)

    def preload(self, module: str) -> None:
        """Let the server import what stages of this module need; does not wait for it."""
        with contextlib.suppress(OSError):  # it has exited; the next `fork` handles that
            self._send({"ranks": 0, "module": module, "files": []})

    def _send(self, request: dict[str, object], *replies: int) -> None:
        file = os.memfd_create("request")
        try:
            os.write(file, json.dumps(request).encode())
            os.lseek(file, 0, os.SEEK_SET)
            with self._lock:
                socket.send_fds(self._control, [b"."], [file, *replies])
        finally:
            os.close(file)

    @property
    def busy(self) -> bool:
        """Whether one of its stages is running."""
        return any(stage.poll() is None for stage in self._stages)

    def close(self) -> None:
        """Kill the server and its stages, and wait for the server's exit."""
        if self.owner != os.getpid():
            return
        self._control.close()
        self._process.kill()  # the kernel then sends SIGTERM to its stages
        self._process.wait()


class Forked:
    """A forked stage, with the part of `subprocess.Popen`'s interface that launchers need.

    Attributes:
        stdout: output of the stage and its children.
        returncode: exit code, or the negated number of the signal that ended it; None while it
            runs.
    """

    def __init__(self, pid: int, state: int, stdout: IO[bytes]) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._state = state
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The returncode, or None while the stage runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the returncode.

        Args:
            timeout: seconds; None waits without a limit.

        Raises:
            subprocess.TimeoutExpired: the stage still runs.
        """
        with self._lock:
            if self.returncode is None:
                if not _readable(self._state, timeout):
                    raise subprocess.TimeoutExpired(f"stage {self.pid}", timeout or 0)
                line = _line(self._state)
                # no line: the server was killed, and the kernel has sent this stage SIGTERM
                self.returncode = int(line) if line else self._wait_without_server(timeout)
                os.close(self._state)
            return self.returncode

    def _wait_without_server(self, timeout: float | None) -> int:
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                psutil.Process(self.pid).wait(timeout)
            except psutil.TimeoutExpired:
                raise subprocess.TimeoutExpired(f"stage {self.pid}", timeout or 0) from None
        return -signal.SIGTERM

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send a signal, if the stage still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


_lock = threading.Lock()
_current: ForkServer | None = None


def preload(module: str, environment: dict[str, str]) -> None:
    """Start this process's fork server, if there is none, and let it import what every stage needs
    in the background, so that the first stage does not wait for it."""
    global _current
    if sys.platform != "linux":
        return
    with _lock:
        if _current is not None and _current.owner == os.getpid():
            return
        _current = ForkServer(environment)
    _current.preload(module)


def fork(
    ranks: int, module: str, files: Sequence[str], environment: dict[str, str]
) -> Forked | None:
    """Fork a stage from this process's fork server, which is started if there is none.

    Args:
        ranks: number of ranks under torchrun; 0: one process without torchrun.

    Returns:
        The stage; None if it cannot be forked and has to be started as a new process.
    """
    global _current
    if sys.platform != "linux":
        return None
    for _ in range(2):  # the second time if an idle server has exited
        with _lock:
            server = _current
            if server is None or server.owner != os.getpid():
                server = _current = ForkServer(environment)
        if server.key != _key(environment):
            if server.busy:
                return None
            close()
            continue
        if (stage := server.fork(ranks, module, files, environment)) is not None:
            return stage
        with _lock:
            if _current is server:
                _current = None
        server.close()
    return None


def close() -> None:
    """Stop this process's fork server, if there is one; a later stage starts another."""
    global _current
    with _lock:
        server, _current = _current, None
    if server is not None:
        server.close()


atexit.register(close)


def _key(environment: dict[str, str]) -> dict[str, str]:
    """What a stage and the server that forks it have in common: variables, and the working folder,
    from which Python may import."""
    found = {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT)}
    with contextlib.suppress(OSError):  # a folder that has been deleted
        found[""] = os.getcwd()
    return {**found, "OMP_NUM_THREADS": ""}


def _readable(descriptor: int, timeout: float | None) -> bool:
    """Whether there are bytes to read, or the end of the file, within this many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _line(descriptor: int) -> str:
    """One line, without its end; empty at the end of the file."""
    found = b""
    while not found.endswith(b"\n"):
        if not (byte := os.read(descriptor, 1)):
            return ""
        found += byte
    return found.decode().strip()
