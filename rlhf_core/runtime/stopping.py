"""SIGTERM and SIGINT in a rank: write a checkpoint and leave, within seconds.

torchrun passes both on to its ranks, and also sends SIGTERM to the ranks that are left when one has
died. A training loop asks at its steps' ends whether it is to stop (see Checkpointer). Whatever
does not ask, or cannot because it waits for a rank that is gone, is ended by a thread: signals
reach it through a pipe, also while the main thread is inside a collective operation, where Python's
own handlers do not run.
"""

from __future__ import annotations

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
LOOK_SECONDS = 0.1
NOTICE_SECONDS = 5.0  # that torchrun has to notice the rank whose end is another one's failure
# What the other ranks say when one of them has gone.
RANK_GONE = re.compile(
    r"connection (reset|closed|refused)|broken pipe|gloo|nccl|c10d|tcpstore|store\b.*\btimeout"
    r"|socket|timed out|process ?group|distbackenderror|collective",
    re.IGNORECASE,
)
_FORKED = ("rlhf_core/runtime/torchrun.py", "rlhf_core/runtime/fork_server.py")


class Stop:
    """What a rank knows about being told to stop.

    Attributes:
        asked: the job was told to stop.
        phase: "idle" leaves at once; "training" at the end of a step, or when another rank is gone;
            "leaving" needs no other rank any more, and is waited for.
        seconds: time between the signal and the end, whatever happens.
        folder: job folder, for the error file.
        uploading: whether a checkpoint is on its way to the store.
    """

    def __init__(self) -> None:
        self.asked = False
        self.phase: Literal["idle", "training", "leaving"] = "idle"
        self.seconds = 15.0
        self.folder: Path | None = None
        self.uploading: Callable[[], bool] = lambda: False

    def install(self) -> None:
        """Take over both signals. Call once, in the main thread."""
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
        self.asked = True
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            useless = self.phase == "idle" or (self.phase == "training" and _a_rank_is_gone())
            if useless and not self.uploading():
                break
            time.sleep(LOOK_SECONDS)
        self._leave(NAMES[signal.Signals(number)])

    def settle(self, message: str) -> None:
        """Before this process ends for a failure: let a checkpoint that is on its way arrive, and,
        where the message says that another rank is gone, let torchrun notice that one first. It
        names the rank whose end it sees, and ends the others.
        """
        self.phase = "idle"
        end = time.monotonic() + self.seconds
        while self.uploading() and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        end = time.monotonic() + NOTICE_SECONDS
        while RANK_GONE.search(message) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)

    def _leave(self, name: str) -> None:
        """End this process from the thread."""
        rank = os.environ.get("RANK", "0")
        reason = f"stopped by {name}"
        if self.phase == "training":
            print(stacks(rank), file=sys.stderr, flush=True)
        if self.phase == "leaving":
            reason += f" before the store had taken everything, which {self.seconds:g} s were given"
        if self.phase != "idle":
            reason += "; the last checkpoint in the store holds"
        if self.phase != "training" or not _a_rank_is_gone():  # else that rank has the reason
            write_error(self.folder, rank, "preempted", reason)
        os._exit(1)


def _ordinary_signals() -> None:
    """A child that is forked from a rank can be ended as any other process."""
    signal.set_wakeup_fd(-1)
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)


def _a_rank_is_gone() -> bool:
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


def stacks(rank: str) -> str:
    """The Python stack of every thread of this process, in one text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"rank {rank}: Python stack of every thread"]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"rank {rank}, thread {names.get(ident, ident)}:")
            frames = traceback.extract_stack(frame)
            # what stands above the rank's own code is the agent that it was forked from
            own = [i for i, f in enumerate(frames) if f.filename.endswith(_FORKED)]
            parts.append("".join(traceback.format_list(frames[max(own, default=0) :])).rstrip())
    return "\n".join(parts)


def write_error(folder: Path | None, rank: str, category: str, message: str) -> None:
    """error-<rank>.json of a job folder, unless this rank has given a reason already."""
    if folder is None or not folder.is_dir() or (folder / f"error-{rank}.json").exists():
        return
    value = {"category": category, "message": message, "time": time.time()}
    partial = folder / f"error-{rank}.json.part"
    partial.write_text(json.dumps(value))
    partial.replace(folder / f"error-{rank}.json")


stop = Stop()
