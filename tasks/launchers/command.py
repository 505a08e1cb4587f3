"""The command lines of a launch, for all launchers, and the environment of its processes."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.jobs import Job
from rlhf_core.system.cpus import cpu_cores
from rlhf_core.system.processes import python_path


@dataclass(frozen=True)
class Node:
    """One machine of a launch; by default the only one.

    Attributes:
        rank: among the nodes. Ranks 0, 1, ... are on node 0.
        count: of nodes.
        rendezvous: address of node 0, and its port unless it is the only node.
        address, interface: of this node towards node 0.
        run: id of the attempt, the same on all nodes.
    """

    rank: int = 0
    count: int = 1
    rendezvous: str = "127.0.0.1"
    address: str = "127.0.0.1"
    interface: str = "lo"
    run: str = ""


ALONE = Node()


def agent_command(
    store: str,
    launch: str,
    attempt: str,
    nodes: int,
    node_rank: int | str,
    rendezvous: str,
    *,
    scratch: str | None = None,
    python: str = sys.executable,
) -> list[str]:
    """The command that runs a launch's part of one node, see `tasks.launchers.node_agent`.

    Args:
        store: URL of the artifact store.
        launch: its id, see `rlhf_core.runtime.launches`.
        attempt: name of this start of all nodes: letters, digits, dots and dashes.
        node_rank: from 0; a text such as "$SLURM_NODEID" for a shell that fills it in.
        rendezvous: HOST:PORT of node 0, where the port is free and the nodes reach it.
        scratch: folder on the node for job folders; None: below the node's $RLHF_HOME.
        python: interpreter on the node.
    """
    where = [] if scratch is None else ["--scratch", scratch]
    return [
        python, "-m", "tasks.launchers.node_agent", "--store", store, "--launch", launch,
        "--attempt", attempt, "--nodes", str(nodes), "--node-rank", str(node_rank),
        "--rendezvous", rendezvous, *where,
    ]  # fmt: skip


def torchrun_command(
    module: str,
    jobs: Sequence[Job],
    files: Sequence[Path],
    devices: Sequence[str] = (),
    node: Node = ALONE,
) -> list[str]:
    """The command that runs jobs on this machine: torchrun, or the only process.

    Args:
        module: is run as `python -m MODULE FOLDER/job.json`, or as MODULE.main([...]) in forked
            ranks.
        devices: GPUs of the ranks; empty: torchrun's agent forks its ranks.
    """
    ranks, names = str(jobs[0].placement().ranks), [str(file) for file in files]
    if not jobs[0].torchrun:
        return [sys.executable, "-m", module, *names]
    place = [
        "--nnodes", str(node.count), "--nproc-per-node", ranks,
        "--rdzv-endpoint", node.rendezvous, "--local-addr", node.address,
        "--rdzv-id", node.run or uuid.uuid4().hex, "--rdzv-conf", f"node_rank={node.rank}",
    ]  # fmt: skip
    if not devices:
        return [sys.executable, "-m", "rlhf_core.runtime.torchrun", *place, module, *names]
    return [sys.executable, "-m", "rlhf_core.runtime.rendezvous", *place, "-m", module, *names]


# OpenMP threads that wait: spinning for long is 7 times slower on shared cores, sleeping at once is
# a fifth slower with small models. So they spin for about 20 microseconds and then sleep.
OPENMP_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


def environment(
    jobs: Sequence[Job], store: str, devices: Sequence[str] = (), node: Node = ALONE
) -> dict[str, str]:
    """Environment of a launch's processes on this machine."""
    placement = jobs[0].placement()
    ranks = placement.ranks if jobs[0].torchrun else 1
    threads = placement.threads or max(1, cpu_cores() // ranks)
    return {
        **base_environment(node),
        "OMP_NUM_THREADS": str(threads),
        "RLHF_STORE": store,
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
    }


def base_environment(node: Node = ALONE) -> dict[str, str]:
    """This process's environment with defaults that all ranks need; the user's values win."""
    defaults = {
        **OPENMP_WAIT,
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        # Ranks connect and listen here only. By default gloo takes the address of the host's name,
        # which may not resolve, and NCCL any interface. InfiniBand is found by NCCL itself.
        "GLOO_SOCKET_IFNAME": node.interface,
        "NCCL_SOCKET_IFNAME": f"={node.interface}",
    }
    return {**defaults, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path()}
