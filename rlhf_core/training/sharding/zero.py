"""zero1, zero2, zero2_cpu: ColossalAI's ZeRO through its Booster.

Every rank holds the whole model in bf16 or fp16 (fp32 if the precision is fp32), and a share of the
fp32 master weights and of AdamW's states; zero2 also shards the gradients, and zero2_cpu keeps
master weights and states in the host's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core.jobs import Precision, Strategy
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.sharding.backend import (
    FIRST_LOSS_SCALE,
    Backend,
    Context,
    Guard,
    Update,
)
from rlhf_core.training.sharding.parts import Range


class Zero(Backend):
    """See the module."""

    def __init__(
        self, group: Group, precision: Precision, max_grad_norm: float, kind: Strategy
    ) -> None:
        super().__init__(group, precision, max_grad_norm)
        self.kind = kind
        self._booster: Any = None
        self._module: Any = None

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self.name_parameters(module, optimizer)
        if self.device.type == "cpu":
            from rlhf_core.training import cpu_accelerator

            cpu_accelerator.install()
        from colossalai.booster import Booster
        from colossalai.booster.plugin import LowLevelZeroPlugin

        plugin = LowLevelZeroPlugin(
            stage=1 if self.kind == "zero1" else 2,
            precision=self.precision,
            max_norm=self.max_grad_norm,
            initial_scale=FIRST_LOSS_SCALE,  # its own, 2^32, overflows in the first 16 steps
            hysteresis=1,
            cpu_offload=self.kind == "zero2_cpu",
            overlap_communication=self.device.type == "cuda",
            verbose=False,
        )
        self._booster = Booster(plugin=plugin)
        self._module, self._optimizer, *_ = self._booster.boost(module, optimizer)
        wrapped: nn.Module = self._module
        return wrapped

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._scaling is None else float(self._scaling.loss_scale)

    def no_sync(self) -> Context:
        if self.kind != "zero1" or self.group.size == 1:
            return super().no_sync()
        context: Context = self._booster.no_sync(self._module, self._optimizer)
        return context

    def backward(self, loss: Tensor) -> None:
        # ZeRO takes the mean over the ranks.
        with torch.autocast(self.device.type, enabled=False):
            self._booster.backward(loss * self.group.size, self._optimizer)

    def step(self, guard: Guard) -> Update:
        optimizer, scale = self._optimizer, self.loss_scale
        norms: list[float] = []
        unscale_and_clip = optimizer._unscale_and_clip_grads

        def check_first(gradients: Sequence[Tensor], norm: float) -> None:
            norms.append(float(norm) / scale)
            guard(norms[0])
            unscale_and_clip(gradients, norm)

        # Its own step computes the norm, clips, and updates whatever the norm is.
        optimizer._unscale_and_clip_grads = check_first
        try:
            optimizer.step()
        finally:
            del optimizer._unscale_and_clip_grads
        if not norms:  # fp16 overflowed, and it skipped the step
            guard(float("inf"))
        optimizer.zero_grad()
        after = self.loss_scale if self.precision == "fp16" else None
        return Update(norms[0] if norms else 0.0, after, skipped=not norms)

    @property
    def _scaling(self) -> Any:
        """ColossalAI's loss scaling; None in other precisions than fp16."""
        return self._optimizer.mixed_precision_mixin if self.precision == "fp16" else None

    @property
    def adamw(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self._optimizer.optim
        return inner

    def master(self, param: nn.Parameter) -> Tensor:
        """This rank's share of a parameter's fp32 master weight: of the flattened parameter, which
        is padded to a multiple of the ranks."""
        master: Tensor = self._optimizer.working_to_master_param[id(param)]
        return master

    def held(self, param: nn.Parameter) -> Range:
        each = self.master(param).numel()
        start = min(self.group.rank * each, param.numel())
        return start, min(each, param.numel() - start)

    def placed(self, values: Tensor, param: nn.Parameter) -> Tensor:
        master = self.master(param)
        padded = nn.functional.pad(values, [0, master.numel() - values.numel()])
        return padded.view_as(master)

    def load_weight(self, param: nn.Parameter, value: Tensor) -> None:
        self.master(param).copy_(value)
        param.copy_(self._whole(param))

    def _whole(self, param: nn.Parameter) -> Tensor:
        """A parameter's master weight, gathered on the rank's device."""
        shard = self.master(param).detach().flatten().to(self.device)
        whole = torch.empty(shard.numel() * self.group.size, dtype=shard.dtype, device=self.device)
        dist.all_gather_into_tensor(whole, shard)
        return whole[: param.numel()].view(param.shape)

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        result = {}
        for name, param in self.params.items():
            whole = self._whole(param)
            if keep:
                result[name] = whole.float().cpu()
        return result

    def scaling(self) -> dict[str, float]:
        if self._scaling is None:
            return {}
        scaler = self._scaling.grad_scaler
        return {"scale": float(scaler.scale), "_growth_tracker": float(scaler._growth_step)}

    def load_scaling(self, state: Mapping[str, float]) -> None:
        scaler = self._scaling.grad_scaler
        scaler.scale.fill_(state["scale"])
        scaler._growth_step = int(state["_growth_tracker"])
