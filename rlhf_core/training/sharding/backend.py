"""What every way of spreading a model over the ranks has in common.

A backend is chosen by `resources.strategy`: `replicated` (ddp), `zero` (zero1, zero2, zero2_cpu)
or `fsdp2`. `training.strategy.Strategy` owns one and is what loops call.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Precision
from rlhf_core.models.saving import export
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.sharding.parts import Part, Range, Saved, share, whole_part

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_LOSS_SCALE = 2.0**16  # of fp16, as torch's GradScaler starts
SCALE = "loss_scale"  # prefix of its entries among the optimizer's states
STEP = "step"  # AdamW's count of a parameter's updates, a scalar

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
    def adamw(self) -> torch.optim.Optimizer:
        """The optimizer that holds this rank's states."""
        inner: torch.optim.Optimizer = self._optimizer
        return inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by; 1 in other precisions than fp16."""
        return 1.0

    def scaling(self) -> dict[str, float]:
        """State of fp16's loss scaling: "scale", and "_growth_tracker", the steps since it last
        changed; {} in other precisions."""
        return {}

    def load_scaling(self, state: Mapping[str, float]) -> None:
        """Restore what `scaling` returned, where that is something."""
        raise AssertionError(f"precision {self.precision} has no loss scale")

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

    def state(self) -> dict[str, Part]:
        """What this rank saves: its parts of the weights by name, of AdamW's states by
        "parameter|state", and with fp16 "loss_scale|...". Memory of the training, not copied.
        All ranks' parts together are the state, each element once."""
        found = self.weight_parts()
        for name, param in self.params.items():
            for key, value in self.adamw.state.get(self.master(param), {}).items():
                if key != STEP:
                    found[f"{name}|{key}"] = self._part(value, param)
                elif self.group.rank == 0:
                    found[f"{name}|{key}"] = whole_part(value)
        if self.group.rank == 0:
            scale = {f"{SCALE}|{key}": torch.tensor(v) for key, v in self.scaling().items()}
            found |= {name: whole_part(value) for name, value in scale.items()}
        return {name: part for name, part in found.items() if part.values.numel()}

    def weight_parts(self) -> dict[str, Part]:
        """The weights in `state`."""
        return {n: self._part(self.master(p).detach(), p) for n, p in self.params.items()}

    def _part(self, tensor: Tensor, param: nn.Parameter) -> Part:
        """What this rank saves of a tensor that is spread as a parameter's master weight is."""
        start, count = self.held(param)
        values = local(tensor).reshape(-1)[:count]
        if not self.shards:
            start, count = share(param.numel(), self.group.rank, self.group.size)
            values = values[start : start + count]
        return Part(values, start, tuple(param.shape))

    def load_state(self, saved: Saved) -> None:
        """Restore what the ranks have saved, at any number of ranks and under any strategy."""
        with torch.no_grad():
            for name, param in self.params.items():
                self.load_weight(param, self._take(saved, name, param))
        number = {name: i for i, name in enumerate(self.params)}
        entries: dict[int, dict[str, Tensor]] = {}
        for key in saved.index:
            name, _, field = key.rpartition("|")
            if name in number:
                param = self.params[name]
                own = saved.whole(key) if field == STEP else self._take(saved, key, param)
                entries.setdefault(number[name], {})[field] = own
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": entries, "param_groups": groups})
        prefix = f"{SCALE}|"
        scale = {k.removeprefix(prefix): k for k in saved.index if k.startswith(prefix)}
        if scale and self.scaling():
            self.load_scaling({key: float(saved.whole(name)) for key, name in scale.items()})

    def _take(self, saved: Saved, name: str, param: nn.Parameter) -> Tensor:
        """What this rank holds of a saved tensor of a parameter's shape."""
        return self.placed(saved.read(name, self.held(param)), param)

    def unsharded(self, module: nn.Module, weights: dict[str, Tensor], *, keep: bool) -> nn.Module:
        """The module that was prepared in one piece on the CPU, fp32, with these trained weights;
        the module itself on ranks that do not keep."""
        return export(module, weights) if keep else module

    # ------------------------------------------------------------------ for backends

    shards = True
    """Whether each element is on one rank; False: all are on every rank."""

    @abstractmethod
    def held(self, param: nn.Parameter) -> Range:
        """The elements of the flattened parameter whose master weight is on this rank."""

    @abstractmethod
    def placed(self, values: Tensor, param: nn.Parameter) -> Tensor:
        """The elements `held` (n,) as AdamW keeps a state of the parameter."""

    def master(self, param: nn.Parameter) -> Tensor:
        """The tensor that AdamW updates."""
        return param

    def load_weight(self, param: nn.Parameter, value: Tensor) -> None:
        """Set the weight; `value` is spread as the master weight is."""
        param.copy_(value)

    def name_parameters(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill `params`. Optimizer states are indexed in the order of the optimizer's groups."""
        names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        self.params = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"]}


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_names(found: Iterable[str], wanted: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: a checkpoint is of another set of parameters.
    """
    if odd := sorted(set(found) ^ set(wanted))[:5]:
        raise ConfigError(f"The checkpoint has other parameters than the model, for example {odd}.")
