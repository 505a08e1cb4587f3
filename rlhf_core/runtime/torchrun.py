"""torchrun for ranks on this machine's CPUs: its agent imports what the jobs need and forks ranks.

    python -m rlhf_core.runtime.torchrun RANKS MODULE FOLDER/job.json [FOLDER/job.json ...]

MODULE has `main(files) -> exit code`, which runs a rank, and may have `preload(files)`, which
imports what the ranks need.

torchrun's own command starts each rank as a new interpreter, which imports torch, transformers and
the stage again. That takes more than half of the time to the first step of a small stage. Agent,
rendezvous and failure reports are torchrun's own; only the start of the ranks differs. Not for
GPUs: a process that has used CUDA cannot be forked.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import uuid
from multiprocessing import util

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rlhf_core.runtime import rendezvous
from rlhf_core.system.cpus import set_threads
from rlhf_core.system.processes import name_process


def rank(module: str, files: list[str]) -> None:
    """Run a forked rank."""
    name_process(f"rlhf rank {os.environ['RANK']}")
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # not the agent's handlers
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_threads()
    code = importlib.import_module(module).main(files)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    # The agent waits for all ranks, then each exits at once: the threads of a process group can
    # block the interpreter's normal exit.
    util.Finalize(None, os._exit, (0,), exitpriority=sys.maxsize)


@record
def launch(ranks: int, module: str, files: list[str]) -> None:
    """Run the agent of this many ranks.

    Raises:
        ChildFailedError: a rank failed; the message is torchrun's report.
    """
    name_process("rlhf torchrun")
    rendezvous.register()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint=rendezvous.ADDRESS,
        local_addr=rendezvous.ADDRESS,
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(),
    )
    elastic_launch(config, rank)(module, files)


def main() -> None:
    """Entry point."""
    ranks, module, *files = sys.argv[1:]
    entry = importlib.import_module(module)
    if hasattr(entry, "preload"):
        entry.preload(files)
    launch(int(ranks), module, files)


if __name__ == "__main__":
    main()
