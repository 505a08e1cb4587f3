"""fsdp2: torch's `fully_shard`, which shards weights, gradients and AdamW's states.

Each rank holds 1/n of the fp32 weights, their gradients and AdamW's states. Layers are gathered,
in half precision where the job computes in it, one by one in forward and backward passes (see
`rlhf_core.nn.sharded`). Every micro-batch's gradients are reduced at once: to keep them for the
step's last one would take a whole copy of the gradients on each rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Precision
from rlhf_core.nn.sharded import release, shard, whole
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.sharding.backend import HALF, Backend, Guard, Update, local
from rlhf_core.training.sharding.parts import Range, Saved, share
from rlhf_core.training.sharding.trials import answer_trials

NO_FP16 = (
    "precision is fp16 with the strategy fsdp2, which has no loss scaling: use bf16, or the "
    "strategy zero2 on GPUs without bf16"
)


class FullySharded(Backend):
    """See the module."""

    def __init__(self, group: Group, precision: Precision, max_grad_norm: float) -> None:
        """
        Raises:
            ConfigError: the precision is fp16.
        """
        super().__init__(group, precision, max_grad_norm)
        if precision == "fp16":
            raise ConfigError(NO_FP16 + ".")
        self._mesh: DeviceMesh | None = None
        self._module: Any = None
        self._skeleton: nn.Module | None = None  # the module, its parameters without memory

    @property
    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension."""
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.group.size,))
        return self._mesh

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self.name_parameters(module, optimizer)
        self._skeleton = without_memory(module)
        shard(module, self.mesh, HALF.get(self.precision), trained=True)
        # Sharding replaced the parameters: the optimizer gets the new ones, in the same order.
        sharded = dict(module.named_parameters())
        self.params = {name: sharded[name] for name in self.params}
        new = iter(self.params.values())
        for param_group in optimizer.param_groups:
            param_group["params"] = [next(new) for _ in param_group["params"]]
            param_group["fused"] = True
        self._module, self._optimizer = module, optimizer
        answer_trials(module, self.group)
        return module

    def place_frozen(self, module: nn.Module) -> nn.Module:
        shard(module, self.mesh, None, trained=False)
        answer_trials(module, self.group)
        return module

    def backward(self, loss: Tensor) -> None:
        # FSDP takes the mean over the ranks.
        (loss * self.group.size).backward()  # type: ignore[no-untyped-call]

    def step(self, guard: Guard) -> Update:
        gradients = [local(p.grad) for p in self.params.values() if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if self.group.size > 1:
            dist.all_reduce(squares)
        norm = float(squares.sqrt())
        try:
            guard(norm)
            if norm > self.max_grad_norm:
                torch._foreach_mul_(gradients, self.max_grad_norm / (norm + 1e-6))
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
        return Update(norm)

    # ------------------------------------------------------------------ state

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        result = {}
        for name, param in self.params.items():  # one at a time, so that a GPU holds one whole
            value = whole(param.detach())
            if keep:
                result[name] = value.float().cpu().clone()
        return result

    def held(self, param: nn.Parameter) -> Range:
        # Rows are dealt as torch.chunk does.
        rows = param.shape[0]
        start, count = share(rows, self.group.rank, self.group.size)
        row = param.numel() // rows
        return start * row, count * row

    def placed(self, values: Tensor, param: nn.Parameter) -> Tensor:
        assert isinstance(param, DTensor)
        part = values.view(param.to_local().shape).to(self.device)
        return DTensor.from_local(
            part, self.mesh, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride()
        )

    def load_state(self, saved: Saved) -> None:
        release(self._module)  # what a pass has gathered would be the old weights
        super().load_state(saved)

    def unsharded(self, module: nn.Module, weights: dict[str, Tensor], *, keep: bool) -> nn.Module:
        release(module)
        frozen = {}
        for name, param in module.named_parameters():
            if name not in self.params:
                value = whole(param.detach())
                if keep:
                    frozen[name] = value.float().cpu()
        if not keep:
            return module
        assert self._skeleton is not None
        result = copy.deepcopy(self._skeleton)
        fill(result, {**frozen, **weights})
        return result


def without_memory(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters have shapes but no numbers; tied ones stay tied."""
    known = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, known)


def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Give numbers to the parameters of a copy that `without_memory` made, without copying them;
    memory alone to those that have no value."""
    new = {}
    for name, param in module.named_parameters():
        value = values[name] if name in values else torch.empty(param.shape)
        new[id(param)] = nn.Parameter(value, requires_grad=param.requires_grad)
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is not None:
                part._parameters[name] = new[id(param)]
