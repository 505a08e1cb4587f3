"""fsdp2: torch's `fully_shard`, which shards weights, gradients and AdamW's states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Precision
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.sharding.backend import Backend, Guard, Update


class FullySharded(Backend):
    """See the module."""

    def __init__(self, group: Group, precision: Precision, max_grad_norm: float) -> None:
        super().__init__(group, precision, max_grad_norm)
        raise ConfigError("resources.strategy fsdp2 is not there yet: use zero2.")

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        raise NotImplementedError

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        raise NotImplementedError

    def step(self, guard: Guard) -> Update:
        raise NotImplementedError

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        raise NotImplementedError

    def optimizer_state(self, *, keep: bool) -> dict[str, Tensor]:
        raise NotImplementedError

    def load_state(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        raise NotImplementedError
