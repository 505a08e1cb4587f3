"""What every way of spreading a model over the ranks has in common.

A backend is chosen by `resources.strategy`: `replicated` (ddp), `zero` (zero1, zero2, zero2_cpu)
or `fsdp2`. `training.strategy.Strategy` owns one and is what loops call.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Precision
from rlhf_core.models.saving import export
from rlhf_core.runtime.distributed import Group

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_LOSS_SCALE = 2.0**16  # of fp16, as torch's GradScaler starts
SCALE = "loss_scale"  # prefix of its entries among the optimizer's states

Context = contextlib.AbstractContextManager[Any]
Guard = Callable[[float], None]
"""Called with the global gradient norm before the weights change; raises `NonFinite`."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        grad_norm: global gradient norm before clipping; 0 where the step was skipped.
        loss_scale: of fp16, after the step; None in other precisions.
        skipped: fp16 overflowed, and the weights are unchanged.
    """

    grad_norm: float
    loss_scale: float | None = None
    skipped: bool = False


class Backend(ABC):
    """Sharding, gradient exchange, clipping and state of one rank. Every rank calls every method.

    Gradients are summed over the ranks.
    """

    def __init__(self, group: Group, precision: Precision, max_grad_norm: float) -> None:
        self.group, self.precision, self.max_grad_norm = group, precision, max_grad_norm
        self.device = group.device
        self.params: dict[str, nn.Parameter] = {}  # trained, in the order of the optimizer's groups
        self._optimizer: Any = None

    @abstractmethod
    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Shard or replicate; returns the module to call from now on.

        Args:
            module: on the rank's device, see `Strategy.place`.
        """

    def place_frozen(self, module: nn.Module) -> nn.Module:
        """Put a module that is not trained where the trained one is, and as it is; returns it."""
        return module.to(self.device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by; 1 in other precisions than fp16."""
        return 1.0

    def autocast(self) -> Context:
        """Mixed precision of a forward pass; nothing where the weights are in half precision."""
        return contextlib.nullcontext()

    def no_sync(self) -> Context:
        """Surrounds a micro-batch that is not the step's last: gradients are exchanged later,
        where that is possible."""
        return contextlib.nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's share of the global loss (scalar)."""

    @abstractmethod
    def step(self, guard: Guard) -> Update:
        """Clip, update and clear the gradients."""

    @abstractmethod
    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        """Trained parameters by name, whole, fp32, on the CPU; {} on ranks that do not keep."""

    @abstractmethod
    def optimizer_state(self, *, keep: bool) -> dict[str, Tensor]:
        """AdamW's states as flat "parameter|state" tensors, whole; {} on ranks that do not keep.
        With fp16 also "loss_scale|..."."""

    @abstractmethod
    def load_state(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Restore what `weights` and `optimizer_state` returned, at any number of ranks."""

    def unsharded(self, module: nn.Module, weights: dict[str, Tensor], *, keep: bool) -> nn.Module:
        """The module that was prepared in one piece on the CPU, fp32, with these trained weights;
        the module itself on ranks that do not keep."""
        return export(module, weights) if keep else module

    # ------------------------------------------------------------------ for backends

    def name_parameters(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill `params`. Optimizer states are indexed in the order of the optimizer's groups."""
        names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        self.params = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"]}

    def flat_states(self, state: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
        """Entries of an optimizer's `state_dict()["state"]` as "parameter|state" CPU tensors."""
        names = list(self.params)
        return {
            f"{names[index]}|{key}": torch.as_tensor(value).detach().cpu().clone()
            for index, entry in state.items()
            for key, value in entry.items()
        }

    def nested_states(
        self, flat: Mapping[str, Tensor], part: Callable[[Tensor, nn.Parameter], Tensor]
    ) -> dict[int, dict[str, Tensor]]:
        """Undo `flat_states`; entries of the loss scale are left out.

        Args:
            flat: may lie in a mapped file, of which only the parts are read into memory.
            part: what this rank keeps of a state of the parameter's shape.
        """
        index = {name: i for i, name in enumerate(self.params)}
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in flat.items():
            name, _, field = key.rpartition("|")
            if name == SCALE:
                continue
            own = value if field == "step" else part(value, self.params[name])
            entries.setdefault(index[name], {})[field] = own.clone()  # torch would alias it
        return entries


def scale_entries(flat: Mapping[str, Tensor]) -> dict[str, float]:
    """The loss scale's entries of an optimizer's state: scale, and steps since it last changed."""
    prefix = f"{SCALE}|"
    return {k.removeprefix(prefix): float(v) for k, v in flat.items() if k.startswith(prefix)}


def check_names(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: a checkpoint is of another set of parameters.
    """
    if odd := sorted(set(found) ^ set(wanted))[:5]:
        raise ConfigError(f"The checkpoint has other parameters than the model, for example {odd}.")
