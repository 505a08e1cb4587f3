"""`Group`, every strategy and some stages on two pretended GPUs, by gloo posing as NCCL.

    python -m tests.gpu.ranks results.json

Two ranks are forked from one process that has imported what they need.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from tests.gpu.stages import start

RANKS = 2
TIMEOUT = 60  # seconds that a rank waits for the other


class Checks:
    """Runs checks on every rank; a failed one does not stop the next."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, check: Callable[[], Any]) -> None:
        try:
            self.results[name] = {"found": check()}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.results[name] = {"error": text, "traceback": traceback.format_exc()}


def check_group(checks: Checks, group: Any) -> None:
    """Every method of `Group`; and what NCCL refuses."""
    import torch
    import torch.distributed as dist

    rank, device = group.rank, group.device
    checks("device", lambda: [str(device), torch.cuda.current_device()])
    checks("sum", lambda: group.sum([1.0, float(rank)]).tolist())
    checks("sum on the GPU", lambda: group.sum(torch.ones(2, device=device)).tolist())
    checks("any", lambda: [group.any(rank == 1), group.any(False)])
    checks("gather", lambda: group.gather({"rank": rank}))
    checks("broadcast", lambda: group.broadcast("from 0" if rank == 0 else None))
    checks("barrier", group.barrier)
    checks("in_order", lambda: group.in_order([(1 - rank, f"of {rank}")]))
    checks("interleave", lambda: group.interleave([rank, rank + 2]))
    checks("refuses a CPU tensor", lambda: dist.all_reduce(torch.ones(2)))
    checks("refuses a pickled GPU tensor", lambda: group.gather(torch.ones(2, device=device)))
    other = torch.device("cuda", 1 - rank)
    checks(
        "refuses tensors of two GPUs",
        lambda: torch.ones(2, device=device) + torch.ones(2, device=other),
    )


def train(kind: str, precision: str, device: str, folder: Path) -> dict[str, Any]:
    """Four steps of two micro-batches on a small net, a checkpoint after two of them, and the two
    after it once more from that checkpoint, which is written to a folder."""
    import torch
    from torch import nn

    from rlhf_core.jobs import Resources
    from rlhf_core.training.sharding.parts import to_host
    from rlhf_core.training.strategy import Strategy
    from tests.rlhf_core.training.saving import save

    def start() -> Strategy:
        resources = Resources(strategy=kind, device=device, threads=1, collective_timeout=TIMEOUT)
        strategy = Strategy(resources, precision, 1.0)
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
        net[0].bias.requires_grad_(False)  # as with trainable_layers
        params = [p for p in net.parameters() if p.requires_grad]
        groups = [{"params": params, "lr": 0.1, "peak_lr": 0.1}]
        strategy.prepare(net, torch.optim.AdamW(groups, fused=True))
        return strategy

    data = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 8, 7, generator=data)  # steps, rows, features
    targets = torch.randn(4, 8, generator=data)

    def steps(strategy: Strategy, numbers: range) -> list[list[float]]:
        found = []
        for step in numbers:
            strategy.set_learning_rate(1.0 / (step + 1))
            total = 0.0
            mine = range(strategy.rank, 8, strategy.world_size)
            parts = [mine[: len(mine) // 2], mine[len(mine) // 2 :]]
            for i, part in enumerate(parts):
                x = inputs[step, list(part)].to(strategy.device)
                y = targets[step, list(part)].to(strategy.device)
                with strategy.micro_batch(last=i == len(parts) - 1):
                    loss = (strategy.module(x).squeeze(1).float() - y).square().sum() / 8
                    strategy.backward(loss)
                total += loss.item()
            found.append([float(strategy.group.sum([total])[0]), strategy.step()])
        return found

    strategy = start()
    losses = steps(strategy, range(2))
    devices = sorted({str(part.values.device) for part in to_host(strategy.state()).values()})
    saved = save(strategy, folder)
    losses += steps(strategy, range(2, 4))
    again = start()
    again.load_state(saved)
    resumed = steps(again, range(2, 4))
    return {
        "losses": losses, "resumed": resumed, "saved_on": devices,
        "weights": {name: value.flatten().tolist() for name, value in strategy.weights().items()},
        "resumed_weights": {n: v.flatten().tolist() for n, v in again.weights().items()},
    }  # fmt: skip


# Algorithm, strategy and precision of whole stages.
STAGES = (
    ("sft", "zero2", "fp32"), ("sft", "fsdp2", "fp32"),
    ("ppo", "fsdp2", "bf16"),
)  # fmt: skip


def stage(runner: Any, inputs: Any, algorithm: str, kind: str, precision: str) -> Any:
    """Run a whole stage; its metrics by step."""
    from tests.gpu.cases import Case, job

    place = {"strategy": kind, "ranks": RANKS, "collective_timeout": TIMEOUT}
    _, metrics, _ = runner(
        job(Case(algorithm, "llama", precision), inputs, "cuda", resources=place)
    )
    return metrics


def rank_main(rank: int, port: int, out: Path, runner: Any, inputs: Any) -> None:
    """What each rank does; rank 0 writes the results."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from rlhf_core.jobs import Resources, Strategy
    from rlhf_core.runtime.distributed import Group

    checks, group = Checks(), Group(Resources(device="cuda", collective_timeout=TIMEOUT))
    check_group(checks, group)
    for kind in get_args(Strategy):
        for precision in ("fp32", "bf16", "fp16"):
            saved = out.with_name(f"{kind}-{precision}")
            checks(saved.name, lambda k=kind, p=precision, f=saved: train(k, p, "cuda", f))
    for what in STAGES:
        checks("-".join(("stage", *what)), lambda what=what: stage(runner, inputs, *what))
    group.barrier()  # the other rank may still need what this one sends
    out.with_suffix(f".{rank}").write_text(json.dumps(checks.results))


def main(arguments: list[str]) -> int:
    out = Path(arguments[0])
    os.environ["RLHF_PRETEND_GPUS"] = str(RANKS)
    with tempfile.TemporaryDirectory(prefix="rlhf-gpu-") as folder:
        return run_ranks(*start(Path(folder), ["llama"]), out)


def run_ranks(runner: Any, inputs: Any, out: Path) -> int:
    """Fork the ranks and wait for them; 0 if none failed."""
    import colossalai.booster  # noqa: F401  # before the fork: two seconds

    import rlhf_core.training.strategy  # noqa: F401
    from rlhf_core.system.ports import free_ports

    (port,), children = free_ports(1), []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank_main(rank, port, out, runner, inputs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
