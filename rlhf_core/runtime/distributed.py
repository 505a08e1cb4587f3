"""The ranks of a stage: device, process group, and the collectives that stages use.

Separate from `strategy`, because labelling and evaluation need ranks but neither ColossalAI nor an
optimizer, and importing ColossalAI takes seconds in each process.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Resources
from rlhf_core.system.cpus import cpu_cores


def pick_device(resources: Resources) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: device=cuda without a GPU.
    """
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("resources.device is cuda, but torch sees no GPU: use auto or cpu.")
    if resources.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 natively: GPUs, CPUs with AVX512-BF16, AMX or Arm's BF16.

    mkldnn takes bf16 on any CPU with AVX512, and is then several times slower than in fp32.
    """
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        checks = (
            getattr(torch.cpu, n, None)
            for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return any(check is not None and check() for check in checks)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Group:
    """All ranks of this job."""

    def __init__(self, resources: Resources) -> None:
        """Join torchrun's process group (gloo on CPUs, NCCL on GPUs); a group of one without it.

        Raises:
            ConfigError: device=cuda without a GPU.
        """
        self.device = pick_device(resources)
        if not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "gloo" if self.device.type == "cpu" else "nccl"
            timeout = datetime.timedelta(seconds=resources.collective_timeout)
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # On GPUs too. A forked process makes its thread pool anew at the first call: autograd's
        # threads, one for each GPU, would do so at once, and torch then ends the process.
        torch.set_num_threads(resources.threads or max(1, cpu_cores() // on_this_node))

    def gather_beside(self) -> Callable[[Any], list[Any]]:
        """A `gather` for a thread beside the training's collectives: it has a process group of its
        own, through the host, and waits for as long as no rank has ended. Every rank must call."""
        if self.size == 1:
            return self.gather
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=group)
            return values

        return gather

    def sum(self, values: Tensor | Sequence[float]) -> Tensor:
        """Elementwise sum over the ranks, fp64, on the CPU."""
        own = torch.as_tensor(values, dtype=torch.float64).detach()
        if self.size == 1:  # alone on a GPU there is nothing to wait for
            return own.cpu().clone()
        total = own.to(self.device).clone()
        dist.all_reduce(total)
        return total.cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return bool(self.sum([float(flag)])[0] > 0)

    def gather(self, value: Any) -> list[Any]:
        """One value of every rank, on every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def in_order(self, mine: Iterable[tuple[int, Any]]) -> list[Any]:
        """Undo `split_batch`: the values that all ranks found, each with its position in the whole
        list, in the order of the positions."""
        found = {position: value for part in self.gather(list(mine)) for position, value in part}
        return [found[position] for position in range(len(found))]

    def interleave(self, mine: Sequence[Any]) -> list[Any]:
        """Undo `rows[rank::size]`: every rank's values, in the order of the whole list."""
        parts = self.gather(list(mine))
        total = sum(len(p) for p in parts)
        return [parts[i % self.size][i // self.size] for i in range(total)]
