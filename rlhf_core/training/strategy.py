"""How a model and its optimizer are spread over the ranks: a thin layer over ColossalAI's Booster.

One `Strategy` per training process. The loop calls, per optimizer step::

    with strategy.micro_batch(last=...):      # gradients are exchanged once per step where possible
        loss = ...                            # already divided by the GLOBAL batch's count
        strategy.backward(loss)
    grad_norm = strategy.step()               # average, clip, update, clear

Gradients are *summed* over ranks: the plugins average them, so `backward` multiplies by the world
size. With losses divided by the global batch's token count that makes the result independent of
how the batch was cut into micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core.errors import ConfigError, NonFinite
from rlhf_core.jobs import Precision, Resources
from rlhf_core.nn.modules import padding_cost
from rlhf_core.runtime.distributed import Group, computes_in_bf16

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy:
    """Process group, precision, sharding, gradient exchange and clipping of one rank."""

    def __init__(self, resources: Resources, precision: Precision, max_grad_norm: float) -> None:
        """Join the process group. Every rank constructs one, with equal arguments.

        Args:
            resources: strategy, device and time-out.
            precision: arithmetic of forward and backward; master weights are always fp32.
            max_grad_norm: bound of the global gradient norm.

        Raises:
            ConfigError: the strategy or precision cannot run on this device.
        """
        self.kind = resources.strategy
        self.precision: Precision = precision
        self.max_grad_norm = max_grad_norm
        self.group = Group(resources)
        self.device = self.group.device
        if self.device.type == "cpu":
            if self.kind not in ("ddp", "zero1", "zero2"):
                raise ConfigError(
                    f"resources.strategy is {self.kind}, which needs GPUs; this rank runs on the "
                    "CPU: use ddp, zero1 or zero2."
                )
            if precision == "fp16":
                raise ConfigError("precision is fp16, which needs a GPU; on the CPU use bf16.")
        self.rank, self.world_size = self.group.rank, self.group.size
        if precision == "bf16" and self.kind == "ddp" and not computes_in_bf16(self.device):
            self.precision = "fp32"
            if self.rank == 0:
                print("precision bf16: this processor has no bf16 arithmetic, fp32 is faster here")
        self.module: nn.Module | None = None
        self._booster: Any = None
        self._optimizer: Any = None
        self._names: list[str] = []
        self.padding = 1.0
        """Relative cost of a padding token in a forward pass of the module."""

    # ------------------------------------------------------------------ set-up

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Shard or replicate; returns the module that must be called from now on."""
        self.padding = padding_cost(module)
        trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        # Optimizer states are indexed in the order of the optimizer's groups.
        self._names = [trained[id(p)] for g in optimizer.param_groups for p in g["params"]]
        ordered = [p for g in optimizer.param_groups for p in g["params"]]
        self._params = dict(zip(self._names, ordered, strict=True))
        if self.alone():
            self.module, self._optimizer = module, optimizer
            return module
        if self.device.type == "cpu":
            from rlhf_core.training import cpu_accelerator

            cpu_accelerator.install()
        from colossalai.booster import Booster

        amp = "fp16" if self.kind == "ddp" and self.precision == "fp16" else None
        self._booster = Booster(plugin=self._plugin(), mixed_precision=amp)
        boosted = self._booster.boost(module, optimizer)
        self.module, self._optimizer = boosted[0], boosted[1]
        return self.module

    def alone(self) -> bool:
        """Whether there is nothing to shard, exchange or scale: the module then stays unwrapped.

        DDP on one rank would copy every gradient into its buckets, and Booster's import alone
        takes more than a second.
        """
        return self.kind == "ddp" and self.world_size == 1 and self.precision != "fp16"

    def _plugin(self) -> Any:
        from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin

        if self.kind == "ddp":
            return TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.kind == "gemini":
            from colossalai.booster.plugin import GeminiPlugin

            return GeminiPlugin(precision=self.precision, max_norm=self.max_grad_norm)
        return LowLevelZeroPlugin(
            stage=1 if self.kind == "zero1" else 2,
            precision=self.precision,
            max_norm=self.max_grad_norm,
            cpu_offload=self.kind == "zero2_cpu",
            overlap_communication=self.device.type == "cuda",
            verbose=False,
        )

    # ------------------------------------------------------------------ one optimizer step

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision of a forward pass: autocast over fp32 weights for ddp.

        ZeRO and Gemini hold half-precision weights themselves and need none.
        """
        if self.kind == "ddp" and self.precision in HALF:
            return torch.autocast(self.device.type, dtype=HALF[self.precision])
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; the last exchanges gradients."""
        sync = last or self.kind not in ("ddp", "zero1") or self.world_size == 1
        context = (
            contextlib.nullcontext()
            if sync
            else self._booster.no_sync(self.module, self._optimizer)
        )
        with context, self.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's share of the global loss (scalar).

        Raises:
            NonFinite: the loss of this rank is NaN or infinite; the loop adds the step's number.
        """
        if not torch.isfinite(loss.detach()):
            raise NonFinite(f"the loss is {loss.item()}")
        with torch.autocast(self.device.type, enabled=False):
            if self._booster is None:
                loss.backward()  # type: ignore[no-untyped-call]
                return
            self._booster.backward(loss * self.world_size, self._optimizer)

    def step(self) -> float:
        """Clip, update and clear the gradients.

        Returns:
            The global gradient norm before clipping.

        Raises:
            NonFinite: the norm is NaN or infinite (fp16 with loss scaling excepted); the weights
                are unchanged.
        """
        if self.kind == "ddp":
            norm = float(self._clip())
            if not math.isfinite(norm) and self.precision != "fp16":
                self._optimizer.zero_grad()
                raise NonFinite(f"the gradient norm is {norm}")
            self._optimizer.step()
        else:
            self._optimizer.step()
            norm = float(self._optimizer.get_grad_norm() or 0.0)
            if not math.isfinite(norm) and self.precision != "fp16":
                raise NonFinite(f"the gradient norm is {norm}")
        self._optimizer.zero_grad()
        return norm

    def _clip(self) -> Tensor:
        """ddp: scale the gradients down to `max_grad_norm`; their norm before."""
        if self._booster is None:
            return nn.utils.clip_grad_norm_(self._params.values(), self.max_grad_norm)
        return cast(Tensor, self._optimizer.clip_grad_by_norm(self.max_grad_norm))

    def set_learning_rate(self, scale: float) -> None:
        """Set each group's rate to `scale` times its peak ("peak_lr" of the group)."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale

    # ------------------------------------------------------------------ state

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Trained parameters by name, whole, fp32, on the CPU. Every rank must call.

        Args:
            keep: False on ranks that do not need the copy; they get {}.
        """
        if self.kind == "ddp":
            params = self._params if keep else {}
            return {n: p.detach().float().cpu().clone() for n, p in params.items()}
        if self.kind == "gemini":
            state = cast(Any, self.module).state_dict(only_rank_0=False)
            return {n: state[n].detach().float().cpu() for n in self._names} if keep else {}
        result = {}
        masters = self._optimizer.working_to_master_param
        for name, param in self._params.items():
            shard = masters[id(param)].detach().flatten().to(self.device)
            whole = torch.empty(
                shard.numel() * self.world_size, dtype=shard.dtype, device=self.device
            )
            dist.all_gather_into_tensor(whole, shard)
            if keep:
                result[name] = whole[: param.numel()].view(param.shape).float().cpu()
        return result

    def optimizer_state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """AdamW's states as flat "parameter|state" tensors, whole. Every rank must call.

        Args:
            keep: False on ranks that do not need the copy; they get {}.
        """
        state = self._optimizer.state_dict()["state"]
        if not keep:
            return {}
        return {
            f"{self._names[index]}|{key}": torch.as_tensor(value).detach().cpu().clone()
            for index, entry in state.items()
            for key, value in entry.items()
        }

    def load_state(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Restore what `weights` and `optimizer_state` returned, at any number of ranks.

        Raises:
            ConfigError: the checkpoint is of another set of parameters.
        """
        if set(weights) != set(self._names):
            odd = sorted(set(weights) ^ set(self._names))[:5]
            raise ConfigError(
                f"The checkpoint has other parameters than the model, for example {odd}."
            )
        if self.kind == "gemini":
            cast(Any, self.module).load_state_dict(weights, strict=False)
        for name, param in self._params.items():
            if self.kind != "gemini":
                with torch.no_grad():
                    param.copy_(weights[name])
            if self.kind in ("zero1", "zero2", "zero2_cpu"):
                master = self._optimizer.working_to_master_param[id(param)]
                flat = weights[name].float().flatten()
                padded = nn.functional.pad(
                    flat, [0, master.numel() * self.world_size - flat.numel()]
                )
                with torch.no_grad():
                    master.copy_(padded.chunk(self.world_size)[self.rank].view_as(master))
        entries: dict[int, dict[str, Tensor]] = {}
        index = {name: i for i, name in enumerate(self._names)}
        for key, value in optimizer.items():
            name, _, field = key.rpartition("|")
            entries.setdefault(index[name], {})[field] = value.clone()  # torch would alias it
        current = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})
