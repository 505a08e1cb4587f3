"""A process that imports what stages need once, and forks each stage from itself.

    python -m rlhf_core.runtime.fork_server SOCKET

SOCKET is the descriptor of a Unix socket (see `tasks.launchers.fork_client` for the other end).
Each message brings descriptors: a file with a request, where the stage's output goes, and a
pipe for its state; or the first alone, and then what stages need is imported and none is forked.
The request is JSON:

    ranks        number of ranks under torchrun's agent; 0: one plain process
    module       as `rlhf_core.runtime.torchrun` takes it
    files        job files
    environment  of the stage, whole

The pipe gets the stage's process id in a line, and when it has ended its exit code, or the negated
number of the signal that ended it. The process ends when the socket is closed at the other end,
and then the kernel sends SIGTERM to the stages that are left; or after `IDLE_SECONDS` in which
nothing was asked for. Linux only, and not for stages on GPUs: what has touched CUDA cannot be
forked.
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
# A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group: the stages answer
# them, and this process ends with the one that started it.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Template:
    """What the process does.

    Attributes:
        stages: descriptor of a stage's process -> its id and the pipe for its state.
    """

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.stages: dict[int, tuple[int, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> None:
        """Fork stages until the other end is closed, or nobody asks any more."""
        while events := self._selector.select(None if self.stages else IDLE_SECONDS):
            for key, _ in events:
                if key.fd != self.control.fileno():
                    self._ended(key.fd)
                elif not self._asked():
                    return

    def _asked(self) -> bool:
        """Take a message; False when there will be none any more."""
        _, descriptors, *_ = socket.recv_fds(self.control, 1, 3)
        if not descriptors:
            return False
        asked, *answers = descriptors
        with open(asked, encoding="utf-8") as file:
            request = json.load(file)
        preload(request)
        if not answers:
            return True
        output, state = answers
        # a signal that comes before the stage listens to it waits
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        if (pid := os.fork()) == 0:
            self._forget()
            os.close(state)
            be_stage(request, output)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
        os.close(output)
        watched = os.pidfd_open(pid)
        self.stages[watched] = (pid, state)
        self._selector.register(watched, selectors.EVENT_READ)
        try:
            os.write(state, b"%d\n" % pid)
        except OSError:  # whoever asked has been stopped meanwhile
            os.kill(pid, signal.SIGTERM)
        return True

    def _ended(self, watched: int) -> None:
        self._selector.unregister(watched)
        pid, state = self.stages.pop(watched)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            os.write(state, b"%d\n" % code)
        os.close(state)
        os.close(watched)

    def _forget(self) -> None:
        """In a stage: nothing here is its business."""
        self._selector.close()
        self.control.close()
        for watched, (_, state) in self.stages.items():
            os.close(watched)
            os.close(state)


def preload(request: dict[str, Any]) -> None:
    """Import what the stage needs, for it and for those that come after it. What is wrong with it,
    the stage will say."""
    with contextlib.suppress(Exception):
        entry = importlib.import_module(request["module"])
        if hasattr(entry, "preload"):
            entry.preload(request["files"])
        if request["ranks"]:
            importlib.import_module("rlhf_core.runtime.torchrun")


def be_stage(request: dict[str, Any], output: int) -> None:
    """What a forked process does; it does not return."""
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
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # a normal exit would also do what the template wants done at its own
        os._exit(code)


def run(request: dict[str, Any]) -> int:
    """The stage; its exit code."""
    files = list(request["files"])
    if request["ranks"]:
        from rlhf_core.runtime.torchrun import launch

        launch(request["ranks"], request["module"], files)
        return 0
    set_threads()
    return int(importlib.import_module(request["module"]).main(files))


def main() -> None:
    """Entry point."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    name_process("rlhf template")
    Template(socket.socket(fileno=int(sys.argv[1]))).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
