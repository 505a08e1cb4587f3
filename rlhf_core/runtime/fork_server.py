"""The fork server: a process that imports what stages need once, and forks each stage from itself.

    python -m rlhf_core.runtime.fork_server SOCKET

SOCKET is the descriptor of a Unix socket; `tasks.launchers.fork_client` has the other end. Each
message passes descriptors: a file with the request, the stage's output, and a pipe for its state.
A message with the request alone preloads what the stage needs and forks nothing. The request is
JSON:

    ranks        number of ranks under torchrun's agent; 0: one process without torchrun
    module       as for `rlhf_core.runtime.torchrun`
    files        job files
    environment  all environment variables of the stage

The pipe gets a line with the stage's process id. When the stage has ended, it gets a line with the
exit code, or with the negated number of the signal that ended it.

The server exits when the socket is closed, and the kernel then sends SIGTERM to its stages. It also
exits after `IDLE_SECONDS` without a request. Linux only, and not for stages on GPUs: a process that
has used CUDA cannot be forked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import Any

from rlhf_core.system.cpus import set_threads
from rlhf_core.system.processes import die_with_parent, name_process

IDLE_SECONDS = 600.0
# A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group. The stages handle
# them; the server exits with the process that started it.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class ForkServer:
    """Forks stages on request.

    Attributes:
        stages: pidfd of a stage -> its process id and the pipe for its state.
    """

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.stages: dict[int, tuple[int, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> None:
        """Fork stages until the socket is closed or there was no request for a while."""
        while events := self._selector.select(None if self.stages else IDLE_SECONDS):
            for key, _ in events:
                if key.fd != self.control.fileno():
                    self._report_exit(key.fd)
                elif not self._handle_request():
                    return

    def _handle_request(self) -> bool:
        """Handle one message; False when the socket is closed."""
        _, descriptors, *_ = socket.recv_fds(self.control, 1, 3)
        if not descriptors:
            return False
        request_file, *replies = descriptors
        with open(request_file, encoding="utf-8") as file:
            request = json.load(file)
        preload(request)
        if not replies:
            return True
        output, state = replies
        # a signal that comes before the stage has its handlers is delivered afterwards
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        if (pid := os.fork()) == 0:
            self._close_inherited()
            os.close(state)
            run_stage(request, output)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
        os.close(output)
        pidfd = os.pidfd_open(pid)
        self.stages[pidfd] = (pid, state)
        self._selector.register(pidfd, selectors.EVENT_READ)
        try:
            os.write(state, b"%d\n" % pid)
        except OSError:  # the client has been stopped meanwhile
            os.kill(pid, signal.SIGTERM)
        return True

    def _report_exit(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        pid, state = self.stages.pop(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            os.write(state, b"%d\n" % code)
        os.close(state)
        os.close(pidfd)

    def _close_inherited(self) -> None:
        """In a stage: close the server's descriptors."""
        self._selector.close()
        self.control.close()
        for pidfd, (_, state) in self.stages.items():
            os.close(pidfd)
            os.close(state)


def preload(request: dict[str, Any]) -> None:
    """Import what the stage needs, for it and for later ones. Errors are left for the stage to
    report."""
    with contextlib.suppress(Exception):
        entry = importlib.import_module(request["module"])
        if hasattr(entry, "preload"):
            entry.preload(request["files"])
        if request["ranks"]:
            importlib.import_module("rlhf_core.runtime.torchrun")


def run_stage(request: dict[str, Any], output: int) -> None:
    """Run a stage in the forked process; does not return."""
    code = 1
    try:
        parent = os.getppid()
        die_with_parent(signal.SIGTERM)
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
        if os.getppid() != parent:
            os._exit(1)
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        code = run(request)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # a normal exit would also run the server's exit handlers
        os._exit(code)


def run(request: dict[str, Any]) -> int:
    """Run the stage; returns its exit code."""
    files = list(request["files"])
    if request["ranks"]:
        from rlhf_core.runtime.torchrun import Place, launch

        launch(Place(request["ranks"]), request["module"], files)
        return 0
    set_threads()
    return int(importlib.import_module(request["module"]).main(files))


def main() -> None:
    """Entry point."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    name_process("rlhf forkserver")
    ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
