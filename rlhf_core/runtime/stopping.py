"""SIGTERM and SIGINT in a rank: write a checkpoint and exit, within seconds.

torchrun forwards both signals to its ranks. When a rank has died, it sends SIGTERM to the others.
A training loop checks after each step whether it should stop (see Checkpointer). A thread ends
everything else: code that does not check, and a rank that waits for one that has died. The thread
gets signals through a pipe, because Python's own handlers do not run while the main thread is
inside a collective operation.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}
POLL_SECONDS = 0.1
NOTICE_SECONDS = 5.0  # for torchrun to notice the rank that died first
# In the errors of the other ranks when one has died.
PEER_LOST = re.compile(
    r"connection (reset|closed|refused)|broken pipe|gloo|nccl|c10d|tcpstore|store\b.*\btimeout"
    r"|socket|timed out|process ?group|distbackenderror|collective",
    re.IGNORECASE,
)
NEED_STACKS = ("internal", "hang", "oom", "preempted")  # categories of which a log shows stacks
_FORKED = ("rlhf_core/runtime/torchrun.py", "rlhf_core/runtime/fork_server.py")


class Stop:
    """Whether, and how, this rank has to stop.

    Attributes:
        requested: a signal told the job to stop.
        phase: "idle" exits at once; "training" exits after the step, or when another rank has
            died; "leaving" needs no other rank and is allowed to finish.
        seconds: longest time between the signal and the exit.
        folder: job folder, for the error file.
        uploading: whether a checkpoint is being uploaded.
    """

    def __init__(self) -> None:
        self.requested = False
        self.phase: Literal["idle", "training", "leaving"] = "idle"
        self.seconds = 15.0
        self.folder: Path | None = None
        self.uploading: Callable[[], bool] = lambda: False

    def install(self) -> None:
        """Handle both signals. Call once, in the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in NAMES:
            signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=_ordinary_signals)
        threading.Thread(target=self._wait, args=(reading,), name="stop", daemon=True).start()

    def _wait(self, reading: int) -> None:
        while (number := os.read(reading, 1)[0]) not in NAMES:
            pass
        self.requested = True
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            useless = self.phase == "idle" or (self.phase == "training" and _rank_died())
            if useless and not self.uploading():
                break
            time.sleep(POLL_SECONDS)
        self._exit(NAMES[signal.Signals(number)])

    def wait_before_failing(self, message: str) -> None:
        """Wait before this process exits with a failure.

        A checkpoint that is being uploaded is finished. If the message says that another rank has
        died, torchrun is given time to notice that rank first: it reports the exit that it sees
        first, and ends the other ranks.
        """
        self.phase = "idle"
        end = time.monotonic() + self.seconds
        while self.uploading() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        end = time.monotonic() + NOTICE_SECONDS
        while PEER_LOST.search(message) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _exit(self, name: str) -> None:
        """End this process; runs in the thread."""
        rank = os.environ.get("RANK", "0")
        reason = f"stopped by {name}"
        if self.phase == "training" and not explained(self.folder):
            print(stacks(rank), file=sys.stderr, flush=True)
        if self.phase == "leaving":
            reason += f" before the upload had finished; it had {self.seconds:g} s (stop_timeout)"
        if self.phase != "idle":
            reason += "; the last checkpoint in the store is intact"
        if self.phase != "training" or not _rank_died():  # else that rank has the reason
            write_error(self.folder, rank, "preempted", reason)
        os._exit(1)


def _ordinary_signals() -> None:
    """Restore the default handlers in a child that is forked from a rank."""
    signal.set_wakeup_fd(-1)
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)


def _rank_died() -> bool:
    """Whether torchrun has fewer ranks on this machine than it started."""
    import psutil

    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if started < 2:
        return False
    try:
        ranks = psutil.Process(os.getppid()).children()
        return sum(rank.status() != psutil.STATUS_ZOMBIE for rank in ranks) < started
    except psutil.Error:
        return True


def explained(folder: Path | None) -> bool:
    """Whether a rank of this machine has told why the job failed, so that the stacks of the others
    add nothing."""
    for path in folder.glob("error-*.json") if folder is not None else ():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text())["category"] not in NEED_STACKS:
                return True
    return False


def stacks(rank: str) -> str:
    """The Python stack of every thread of this process, in one text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"rank {rank}: Python stack of every thread"]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"rank {rank}, thread {names.get(ident, ident)}:")
            frames = traceback.extract_stack(frame)
            # the outer frames are those of the agent that the rank was forked from
            own = [i for i, f in enumerate(frames) if f.filename.endswith(_FORKED)]
            parts.append("".join(traceback.format_list(frames[max(own, default=0) :])).rstrip())
    return "\n".join(parts)


def write_error(folder: Path | None, rank: str, category: str, message: str) -> None:
    """Write error-<rank>.json to a job folder, unless this rank has written one."""
    if folder is None or not folder.is_dir() or (folder / f"error-{rank}.json").exists():
        return
    value = {"category": category, "message": message, "time": time.time()}
    partial = folder / f"error-{rank}.json.part"
    partial.write_text(json.dumps(value))
    partial.replace(folder / f"error-{rank}.json")


stop = Stop()
