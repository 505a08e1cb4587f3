"""ddp: every rank holds the whole model; torch's DistributedDataParallel exchanges gradients.

Weights are fp32; autocast computes in bf16 or fp16. On one rank the module stays unwrapped: DDP
would copy every gradient into its buckets for nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf_core.jobs import Precision
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.sharding.backend import (
    FIRST_LOSS_SCALE,
    HALF,
    Backend,
    Context,
    Guard,
    Update,
)
from rlhf_core.training.sharding.parts import Range


class Replicated(Backend):
    """See the module. One rank, or DistributedDataParallel."""

    def __init__(self, group: Group, precision: Precision, max_grad_norm: float) -> None:
        super().__init__(group, precision, max_grad_norm)
        half = precision == "fp16"
        self._scaler = torch.amp.GradScaler(
            self.device.type, init_scale=FIRST_LOSS_SCALE, enabled=half
        )
        self._ddp: DistributedDataParallel | None = None

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self.name_parameters(module, optimizer)
        self._optimizer = optimizer
        if self.group.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        return self._ddp

    @property
    def loss_scale(self) -> float:
        return float(self._scaler.get_scale())

    def autocast(self) -> Context:
        if self.precision in HALF:
            return torch.autocast(self.device.type, dtype=HALF[self.precision])
        return contextlib.nullcontext()

    def no_sync(self) -> Context:
        return contextlib.nullcontext() if self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        # DDP takes the mean over the ranks.
        with torch.autocast(self.device.type, enabled=False):
            scaled: Any = self._scaler.scale(loss * self.group.size if self._ddp else loss)
            scaled.backward()

    def step(self, guard: Guard) -> Update:
        self._scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.params.values(), self.max_grad_norm))
        try:
            guard(norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        finally:
            self._optimizer.zero_grad()
        if self.precision != "fp16":
            return Update(norm)
        skipped = not math.isfinite(norm)
        return Update(0.0 if skipped else norm, self.loss_scale, skipped)

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        params = self.params if keep else {}
        return {n: p.detach().float().cpu().clone() for n, p in params.items()}

    shards = False

    def held(self, param: nn.Parameter) -> Range:
        return 0, param.numel()

    def placed(self, values: Tensor, param: nn.Parameter) -> Tensor:
        return values.view(param.shape)

    def scaling(self) -> dict[str, float]:
        state = self._scaler.state_dict()  # empty where it is off
        return {key: float(state[key]) for key in ("scale", "_growth_tracker") if state}

    def load_scaling(self, state: Mapping[str, float]) -> None:
        found = dict(state) | {"_growth_tracker": int(state["_growth_tracker"])}
        self._scaler.load_state_dict(self._scaler.state_dict() | found)
