"""Jobs through the real launcher: `python -m tests.faults.orchestrator STORE FOLDER JOB.json ...`.

Exit code 0: its result is in the store. 1: the failure's category and message are printed.
"""

import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import tasks.launchers.local as local
from rlhf_core.errors import JobFailed
from rlhf_core.jobs import parse_job
from rlhf_core.runtime import fork_server
from tasks.launchers import Launch, LocalTorchrun, fork_client

local.MODULE = "tests.faults.ranks"


class ForkedServer:
    """The fork server as `subprocess.Popen` starts it, but forked: its imports are here already."""

    def __init__(
        self, command: list[str], env: dict[str, str], pass_fds: list[int], **_: Any
    ) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                kept = sorted({0, 1, 2, *pass_fds})
                for before, after in pairwise([*kept, 1 << 16]):
                    os.closerange(before + 1, after)
                os.environ.clear()
                os.environ.update(env)
                sys.argv = command[2:]  # of [python, -m, module, ...]
                fork_server.main()
            finally:
                os._exit(1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def stop(number, frame):
    """As Prefect's engine does when a run is cancelled."""
    raise KeyboardInterrupt


def main(store: str, folder: str, *files: str) -> int:
    signal.signal(signal.SIGTERM, stop)
    fork_client.subprocess.Popen = ForkedServer  # type: ignore[misc]
    place = Path(folder)
    jobs = [parse_job(Path(file).read_bytes()) for file in files]
    folders = [place] if len(jobs) == 1 else [place / str(i) for i in range(len(jobs))]
    launch = Launch("stage", dict(zip(folders, jobs, strict=True)), store, place / "log.txt")
    try:
        LocalTorchrun().run(launch, lambda line: print(line, flush=True), lambda line: None)
    except JobFailed as error:
        print(f"FAILED {error.category}: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
