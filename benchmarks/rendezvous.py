"""How ranks of many nodes meet: time, connections and keys of 8 to 64 ranks, eight a node.

    python benchmarks/rendezvous.py [RANKS ...]

All nodes are processes of this machine: agents that meet by the project's rendezvous, and ranks
with gloo on its loopback, forked after the imports, which join the process group of a stage and
the one beside it that checkpoints use. They train nothing. A real machine has a core for each rank
and a slower network. Prints a table, docs/scale.md has it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from torch.distributed.elastic.rendezvous import RendezvousParameters

from rlhf_core.jobs import Resources
from rlhf_core.runtime.distributed import Group
from rlhf_core.runtime.rendezvous import BACKEND, Rendezvous

NODE = 8  # ranks of a node
ROUNDS = 20  # of a collective
MIB = 2**20


def main() -> int:
    sizes = [int(size) for size in sys.argv[1:]] or [8, 16, 32, 64]
    print(
        "| ranks | agents met, s | ranks joined, s | a flag of all ranks, ms | connections of a "
        "rank | keys | own memory of a rank, MiB |\n" + "| ---: " * 7 + "|",
        flush=True,
    )
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder, began = Path(name), time.time()
            port = _free_port()
            nodes = [fork(agent, node, size, port, folder, began) for node in range(size // NODE)]
            assert all(os.waitpid(pid, 0)[1] == 0 for pid in nodes), "a node failed"
            ranks = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
            agents = [json.loads(path.read_text()) for path in folder.glob("agent-*.json")]
        flag, links, own = (median(r[n] for r in ranks) for n in ("flag", "links", "memory"))
        print(
            f"| {size} | {max(a['met'] for a in agents):.1f} | {max(r['met'] for r in ranks):.1f} "
            f"| {1000 * flag:.1f} | {links:.0f} | {max(a['keys'] for a in agents)} | {own:.0f} |",
            flush=True,
        )
    return 0


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def fork(target: object, *arguments: object) -> int:
    """Pid of a process that runs a function."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            target(*arguments)  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    return pid


def agent(node: int, size: int, port: int, folder: Path, began: float) -> None:
    """What torchrun does on a node, without its restarts."""
    nodes = size // NODE
    handler = Rendezvous(
        RendezvousParameters(BACKEND, f"127.0.0.1:{port}", "run", nodes, nodes, node_rank=node)
    )
    info = handler.next_rendezvous()
    met = time.time() - began
    place = info.bootstrap_store_info
    assert place is not None
    os.environ.update(
        MASTER_ADDR=place.master_addr, MASTER_PORT=str(place.master_port), WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(NODE), TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    ranks = [fork(rank, node * NODE + i, i, folder, began) for i in range(NODE)]
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in ranks), "a rank failed"
    found = {"met": met, "keys": handler.store.num_keys() if node == 0 else 0}
    (folder / f"agent-{node}.json").write_text(json.dumps(found))
    info.store.set(f"left/{node}", b"")
    if node == 0:  # its store serves the others
        info.store.wait([f"left/{other}" for other in range(nodes)])


def rank(number: int, local: int, folder: Path, began: float) -> None:
    """A stage's rank up to its first collectives."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(local)}
    group = Group(Resources(device="cpu", threads=1))
    beside = group.gather_beside()
    group.barrier()
    beside(number)
    met = time.time() - began
    start = time.perf_counter()
    for _ in range(ROUNDS):
        group.any(False)
    flag = (time.perf_counter() - start) / ROUNDS
    process = psutil.Process()
    links = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    found = {
        "met": met, "flag": flag, "links": len(links),
        "memory": process.memory_full_info().uss / MIB,
    }  # fmt: skip
    (folder / f"rank-{number}.json").write_text(json.dumps(found))
    group.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
