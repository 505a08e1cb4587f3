"""Jobs through the real launcher: `python -m tests.faults.orchestrator STORE FOLDER JOB.json ...`.

Exit code 0: its result is in the store. 1: the failure's category and message are printed.
"""

import signal
import sys
from pathlib import Path

import tasks.launchers.local as local
from rlhf_core.errors import JobFailed
from rlhf_core.jobs import parse_job
from tasks.launchers import Launch, LocalTorchrun

local.MODULE = "tests.faults.ranks"


def stop(number, frame):
    """As Prefect's engine does when a run is cancelled."""
    raise KeyboardInterrupt


def main(store: str, folder: str, *files: str) -> int:
    signal.signal(signal.SIGTERM, stop)
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
