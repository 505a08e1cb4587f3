"""This process's template: where stages on CPUs are forked from, so that what they import is
imported once and not by every stage (see `rlhf_core.runtime.fork_server`)."""

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

# Variables that libraries read when they are imported begin so. Stages for which they differ are
# not forked from the same template. The number of threads is set in each stage.
READ_AT_IMPORT = (
    "ATEN_", "DNNL_", "GOMP_", "HF_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTHON", "TOKENIZERS_", "TORCH", "TRANSFORMERS_",
)  # fmt: skip
POLL_SECONDS = 0.1


class Template:
    """The template process. It ends when `close` is called, or with this process, however."""

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
        """A stage, once it is there; None when the template is not there any more."""
        request = {"ranks": ranks, "module": module, "files": [*files], "environment": environment}
        output, theirs = os.pipe()
        state, their_state = os.pipe()
        stage = None
        try:
            try:
                self._ask(request, theirs, their_state)
            except OSError:
                return None
            finally:
                for descriptor in (theirs, their_state):
                    os.close(descriptor)
            # not for ever at once: this thread may be told to stop
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

    def warm(self, module: str) -> None:
        """Let it import what stages of this module need; does not wait for it."""
        with contextlib.suppress(OSError):  # it is gone, which the next stage will notice
            self._ask({"ranks": 0, "module": module, "files": []})

    def _ask(self, request: dict[str, object], *answers: int) -> None:
        asked = os.memfd_create("request")
        try:
            os.write(asked, json.dumps(request).encode())
            os.lseek(asked, 0, os.SEEK_SET)
            with self._lock:
                socket.send_fds(self._control, [b"."], [asked, *answers])
        finally:
            os.close(asked)

    @property
    def busy(self) -> bool:
        """Whether a stage of it runs."""
        return any(stage.poll() is None for stage in self._stages)

    def close(self) -> None:
        """End it with the stages that it has, and wait until it is gone."""
        if self.owner != os.getpid():
            return
        self._control.close()
        self._process.kill()  # its stages are sent SIGTERM by the kernel
        self._process.wait()


class Forked:
    """A stage's process: what of `subprocess.Popen` is needed of it.

    Attributes:
        stdout: everything that it and its children print.
        returncode: exit code, or the negated number of the signal that ended it; None while it
            runs.
    """

    def __init__(self, pid: int, state: int, stdout: IO[bytes]) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._state = state
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The returncode, if it is known by now."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The returncode.

        Raises:
            subprocess.TimeoutExpired: it runs after so many seconds still.
        """
        with self._lock:
            if self.returncode is None:
                if not _readable(self._state, timeout):
                    raise subprocess.TimeoutExpired(f"stage {self.pid}", timeout or 0)
                line = _line(self._state)
                # nothing: the template has been killed, and with it this stage is told to end
                self.returncode = int(line) if line else self._outlived(timeout)
                os.close(self._state)
            return self.returncode

    def _outlived(self, timeout: float | None) -> int:
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
        """Any signal, to a process that runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


_lock = threading.Lock()
_current: Template | None = None


def warm(module: str, environment: dict[str, str]) -> None:
    """Start this process's template, if there is none, and let it import in the background what
    every stage needs: the first one is to find it there."""
    global _current
    if sys.platform != "linux":
        return
    with _lock:
        if _current is not None and _current.owner == os.getpid():
            return
        _current = Template(environment)
    _current.warm(module)


def fork(
    ranks: int, module: str, files: Sequence[str], environment: dict[str, str]
) -> Forked | None:
    """A stage, forked from this process's template, which is started if there is none.

    Args:
        ranks: under torchrun; 0: one plain process.

    Returns:
        None where it cannot be done; it has to be started as a process of its own then.
    """
    global _current
    if sys.platform != "linux":
        return None
    for _ in range(2):  # an idle one has left
        with _lock:
            template = _current
            if template is None or template.owner != os.getpid():
                template = _current = Template(environment)
        if template.key != _key(environment):
            if template.busy:
                return None
            close()
            continue
        if (stage := template.fork(ranks, module, files, environment)) is not None:
            return stage
        with _lock:
            if _current is template:
                _current = None
        template.close()
    return None


def close() -> None:
    """End this process's template, if there is one; a later stage starts another."""
    global _current
    with _lock:
        template, _current = _current, None
    if template is not None:
        template.close()


atexit.register(close)


def _key(environment: dict[str, str]) -> dict[str, str]:
    """What has to be alike for a stage to be forked; a module's first place is the folder in which
    Python was started."""
    found = {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT)}
    with contextlib.suppress(OSError):  # a folder that has been deleted
        found[""] = os.getcwd()
    return {**found, "OMP_NUM_THREADS": ""}


def _readable(descriptor: int, timeout: float | None) -> bool:
    """Whether there is something to read, or an end, within so many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _line(descriptor: int) -> str:
    """Up to a line's end; empty when there is none to come."""
    found = b""
    while not found.endswith(b"\n"):
        if not (byte := os.read(descriptor, 1)):
            return ""
        found += byte
    return found.decode().strip()
