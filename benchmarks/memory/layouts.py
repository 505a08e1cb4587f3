"""How each strategy lays out weights, gradients and optimizer states of one rank.

`fsdp2` is torch's own code. DistributedDataParallel and ColossalAI's ZeRO do not run on fake
tensors: their buffers are allocated here as they document them, around a real backward pass.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

HALF = torch.bfloat16
BUCKET = 12 * 2**20  # elements, as rlhf_core.training.sharding.zero sets it


class Layout:
    """One rank's weights, gradients and optimizer states."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.params = [p for g in optimizer.param_groups for p in g["params"]]

    def warm_up(self) -> None:
        """As after some optimizer steps and the first micro-batch of one more."""
        self._gradients()
        self.optimizer.step()

    def _gradients(self) -> None:
        for param in self.params:
            param.grad = torch.zeros_like(param)

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """Surrounds forward and backward pass."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Of the step's last micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Clip and update."""
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


class FullySharded(Layout):
    """fsdp2, by torch's own code."""


class Replicated(Layout):
    """ddp: fp32 weights under autocast."""

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=HALF)

    def backward(self, loss: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            super().backward(loss)


class Zero(Layout):
    """ColossalAI's LowLevelZeroOptimizer: half-precision weights, fp32 masters in shards."""

    def __init__(self, module: nn.Module, optimizer: Any, ranks: int, stage: int) -> None:
        super().__init__(module, optimizer)
        self.ranks, self.stage = ranks, stage
        self.masters = {p: self._shard(p.detach().flatten()).float() for p in self.params}
        for group in optimizer.param_groups:
            group["params"] = [self.masters[p] for p in group["params"]]
        self._reduced: dict[Tensor, Tensor] = {}  # zero2: shards of gradients
        self._bucket: list[Tensor] = []
        for param in self.params:
            param.register_post_accumulate_grad_hook(self._collect)

    def _shard(self, flat: Tensor) -> Tensor:
        return flat[: -(-flat.numel() // self.ranks)].clone()

    def _gradients(self) -> None:
        for param, master in self.masters.items():
            master.grad = torch.zeros_like(master)
            if self.stage == 1:
                param.grad = torch.zeros_like(param)
            else:
                self._reduced[param] = torch.zeros_like(master, dtype=HALF)

    def warm_up(self) -> None:
        super().warm_up()
        self.optimizer.zero_grad()  # of the masters

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._reduce()

    def _collect(self, param: Tensor) -> None:
        if sum(p.numel() for p in self._bucket) + param.numel() > BUCKET:
            self._reduce()
        self._bucket.append(param)

    def _reduce(self) -> None:
        """Gradients of a bucket in one tensor; its shard, or in zero1 all of it, is kept."""
        if not self._bucket:
            return
        grads = [p.grad.flatten() for p in self._bucket if p.grad is not None]
        kept = torch.cat(grads)
        if self.stage == 2:
            kept = self._shard(kept)
        del grads
        for param in self._bucket:
            param.grad = None
            size = param.numel() if self.stage == 1 else self.masters[param].numel()
            piece, kept = kept[:size], kept[size:]
            if param in self._reduced:
                self._reduced[param].add_(piece)
            else:
                self._reduced[param] = piece
        self._bucket.clear()

    def step(self) -> None:
        for param, master in self.masters.items():
            own = self._reduced[param]
            master.grad = (own if self.stage == 2 else self._shard(own)).float()
        nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        self.optimizer.step()
