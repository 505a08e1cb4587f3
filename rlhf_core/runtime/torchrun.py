"""torchrun for ranks on this machine's CPUs: its agent imports what the jobs need and forks ranks.

    python -m rlhf_core.runtime.torchrun [OPTIONS] MODULE FOLDER/job.json [FOLDER/job.json ...]

OPTIONS are those of torchrun's command that `Place` has. MODULE has `main(files) -> exit code`,
which runs a rank, and may have `preload(files)`, which imports what the ranks need.

torchrun's own command starts each rank as a new interpreter, which imports torch, transformers and
the stage again. That takes more than half of the time to the first step of a small stage. Agent,
rendezvous and failure reports are torchrun's own; only the start of the ranks differs. Not for
GPUs: a process that has used CUDA cannot be forked.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import uuid
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Place:
    """This node among those of a launch; by default the only one.

    Attributes:
        ranks: on this node.
        rank: of the node.
        endpoint: address of node 0, and with several nodes its port.
        run: id of the attempt, equal on all nodes.
    """

    ranks: int
    nodes: int = 1
    rank: int = 0
    endpoint: str = rendezvous.ADDRESS
    address: str = rendezvous.ADDRESS
    run: str = field(default_factory=lambda: uuid.uuid4().hex)


@record
def launch(place: Place, module: str, files: list[str]) -> None:
    """Run the agent of this node's ranks.

    Raises:
        ChildFailedError: a rank failed; the message is torchrun's report.
    """
    name_process("rlhf torchrun")
    rendezvous.register()
    rendezvous.stop_once()
    config = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=place.ranks,
        run_id=place.run,
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint=place.endpoint,
        rdzv_configs={"node_rank": place.rank},
        local_addr=place.address,
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(),
    )
    elastic_launch(config, rank)(module, files)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--rdzv-endpoint", default=rendezvous.ADDRESS)
    parser.add_argument("--local-addr", default=rendezvous.ADDRESS)
    parser.add_argument("--rdzv-id", default=uuid.uuid4().hex)
    parser.add_argument("--rdzv-conf", default="node_rank=0")
    parser.add_argument("module")
    parser.add_argument("files", nargs="+")
    given = parser.parse_args()
    entry = importlib.import_module(given.module)
    if hasattr(entry, "preload"):
        entry.preload(given.files)
    number = int(given.rdzv_conf.removeprefix("node_rank="))
    place = Place(
        given.nproc_per_node, given.nnodes, number, given.rdzv_endpoint, given.local_addr,
        given.rdzv_id,
    )  # fmt: skip
    launch(place, given.module, given.files)


if __name__ == "__main__":
    main()
