"""How a model and its optimizer are spread over the ranks.

One `Strategy` per training process. The loop calls, per optimizer step::

    with strategy.micro_batch(last=...):      # gradients are exchanged once per step where possible
        loss = ...                            # already divided by the GLOBAL batch's count
        strategy.backward(loss)
    grad_norm = strategy.step()               # average, clip, update, clear

Gradients are *summed* over ranks: the libraries average them, so `backward` multiplies by the world
size. With losses divided by the global batch's token count that makes the result independent of
how the batch was cut into micro-batches and ranks.

What differs between the strategies is in `training.sharding`: one backend each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError, NonFinite
from rlhf_core.jobs import Precision, Resources
from rlhf_core.nn.modules import padding_cost
from rlhf_core.runtime.distributed import Group, computes_in_bf16
from rlhf_core.training.sharding.backend import HALF, Backend, Update, check_names
from rlhf_core.training.sharding.parts import Part, Range, Saved

__all__ = ["HALF", "Strategy"]


class Strategy:
    """Process group, precision, sharding, gradient exchange and clipping of one rank."""

    def __init__(
        self,
        resources: Resources,
        precision: Precision,
        max_grad_norm: float,
        *,
        speaks: bool = True,
    ) -> None:
        """Join the process group. Every rank constructs one, with equal arguments.

        Args:
            resources: strategy, device and time-out.
            precision: arithmetic of forward and backward; master weights are always fp32.
            max_grad_norm: bound of the global gradient norm.
            speaks: rank 0 prints what the precision means on this device, and skipped updates.

        Raises:
            ConfigError: the strategy or precision cannot run on this device.
        """
        self.kind = resources.strategy
        self._speaks = speaks
        self.max_grad_norm = max_grad_norm
        self.group = Group(resources)
        self.device = self.group.device
        self.rank, self.world_size = self.group.rank, self.group.size
        self.precision = self._check(precision)
        self.module: nn.Module | None = None
        self._backend: Backend = self._new_backend()
        self._losses: list[Tensor] = []  # of the step's micro-batches, on the device
        self.last_update = Update(0.0)
        self.padding = 1.0
        """Relative cost of a padding token in a forward pass of the module."""

    def _check(self, precision: Precision) -> Precision:
        """The precision that the device computes in."""
        on_cpu = self.device.type == "cpu"
        if on_cpu and self.kind == "zero2_cpu":
            raise ConfigError(
                "resources.strategy is zero2_cpu, which needs GPUs; this rank runs on the CPU: use "
                "ddp, zero1, zero2 or fsdp2."
            )
        if on_cpu and precision == "fp16":
            raise ConfigError("precision is fp16, which needs a GPU; on the CPU use bf16.")
        half_weights = self.kind != "ddp"
        if precision == "bf16" and not half_weights and not computes_in_bf16(self.device):
            self._say("precision bf16: this processor has no bf16 arithmetic, fp32 is faster here")
            return "fp32"
        if precision == "fp32" and not on_cpu:
            self._say(
                "WARNING: precision is fp32 on a GPU, several times slower than bf16 and with "
                "twice the activations; set precision bf16 unless you compare numbers"
            )
        return precision

    def _say(self, text: str) -> None:
        if self.rank == 0 and self._speaks:
            print(text, flush=True)

    def _new_backend(self) -> Backend:
        # Imported when they are needed: ColossalAI's import takes more than a second.
        common = (self.group, self.precision, self.max_grad_norm)
        if self.kind == "ddp":
            from rlhf_core.training.sharding.replicated import Replicated

            return Replicated(*common)
        if self.kind == "fsdp2":
            from rlhf_core.training.sharding.fsdp2 import FullySharded

            return FullySharded(*common)
        from rlhf_core.training.sharding.zero import Zero

        return Zero(*common, self.kind)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Shard or replicate onto the rank's device; returns the module to call from now on."""
        self.place(module)
        if self.sharded:  # the answers are found while it is sharded
            self.module = self._backend.prepare(module, optimizer)
            self.padding = padding_cost(module)
        else:
            self.padding = padding_cost(module)
            self.module = self._backend.prepare(module, optimizer)
        return self.module

    @property
    def sharded(self) -> bool:
        """Whether modules are spread over the ranks, frozen ones too: every rank must then run each
        of their passes."""
        return self.kind == "fsdp2"

    @property
    def loads(self) -> bool:
        """Whether this rank reads the weights of models. Where they are sharded, rank 0 reads them
        and hands them out layer by layer, so that one copy is in main memory, not one per rank."""
        return not self.sharded or self.rank == 0

    def place(self, module: nn.Module) -> nn.Module:
        """Put a module that will be trained onto the rank's device, but for one that `prepare` will
        shard: no device could hold it whole. Returns it."""
        return module if self.sharded else module.to(self.device)

    def place_frozen(self, module: nn.Module) -> nn.Module:
        """Put a module that is not trained where the trained one is: onto the rank's device, or
        sharded over the ranks; returns it."""
        return self._backend.place_frozen(module)

    # ------------------------------------------------------------------ one optimizer step

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision of a forward pass."""
        return self._backend.autocast()

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; the last exchanges gradients."""
        exchange = contextlib.nullcontext() if last else self._backend.no_sync()
        with exchange, self.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's share of the global loss (scalar).

        The loss is not read here, which would wait for the GPU: `step` looks at all of them.
        """
        self._losses.append(loss.detach())
        self._backend.backward(loss)

    def step(self) -> float:
        """Clip, update and clear the gradients.

        Where fp16 overflows, the update is skipped and the loss scale halved.

        Returns:
            The global gradient norm before clipping; 0 where the update was skipped.

        Raises:
            NonFinite: a loss or the norm is NaN or infinite; the weights are unchanged.
        """
        try:
            self.last_update = self._backend.step(self._guard)
        finally:
            self._losses = []
        scale = self.last_update.loss_scale
        if self.last_update.skipped:
            self._say(f"fp16 overflow: no update in this step; the loss scale is {scale:g}")
        return self.last_update.grad_norm

    def step_metrics(self) -> dict[str, float]:
        """What the last step has to report: grad_norm; with fp16 also skipped_updates (0 or 1) and
        loss_scale."""
        last = self.last_update
        found = {"grad_norm": last.grad_norm}
        if last.loss_scale is not None:
            found |= {"skipped_updates": float(last.skipped), "loss_scale": last.loss_scale}
        return found

    def _guard(self, norm: float) -> None:
        """Look at the losses and the gradient norm before the weights change.

        Raises:
            NonFinite: on the ranks that found it: the one whose loss it was, or all for the norm.
        """
        losses = torch.stack(self._losses).tolist() if self._losses else []
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            raise NonFinite(f"the loss is {losses[bad]}", micro_batch=bad)
        if math.isfinite(norm):
            return
        # The same on all ranks, so that the one with a bad loss may have left already. Its error is
        # the one to report: the others wait here, and end with it.
        self.group.barrier()
        overflow = self.precision == "fp16"
        if overflow and self._backend.loss_scale > 1.0:
            return  # the update is skipped, and tried again with half the scale
        where = ", with a loss scale of 1" if overflow else ""
        raise NonFinite(f"the gradient norm is {norm}{where}")

    def set_learning_rate(self, scale: float) -> None:
        """Set each group's rate to `scale` times its peak ("peak_lr" of the group)."""
        for group in self._backend.param_groups:
            group["lr"] = group["peak_lr"] * scale

    # ------------------------------------------------------------------ state

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Trained parameters by name, whole, fp32, on the CPU. Every rank must call.

        Args:
            keep: False on ranks that do not need the copy; they get {}.
        """
        return self._backend.weights(keep=keep)

    def state(self) -> dict[str, Part]:
        """This rank's parts of weights and AdamW's states, in the memory of the training."""
        return self._backend.state()

    def held(self) -> dict[str, Range]:
        """By trained parameter: the elements that this rank needs of it, and of its states."""
        return {name: self._backend.held(p) for name, p in self._backend.params.items()}

    def load_state(self, saved: Saved) -> None:
        """Restore what all ranks' `state` was, at any number of ranks. Every rank must call.

        Args:
            saved: has at least the elements that this rank holds.

        Raises:
            ConfigError: the checkpoint is of another set of parameters.
        """
        check_names({name for name in saved.index if "|" not in name}, self._backend.params)
        self._backend.load_state(saved)

    def unsharded(
        self, module: nn.Module, weights: dict[str, Tensor], *, keep: bool = True
    ) -> nn.Module:
        """A trained module in one piece on the CPU, fp32, to be saved. Every rank must call, at the
        end: where it is not sharded, it is the module itself.

        Args:
            module: that `prepare` was called with.
            weights: trained parameters, of `weights` or of a checkpoint; {} where not kept.
            keep: False on ranks that do not need it; they get the module as it is.
        """
        return self._backend.unsharded(module, weights, keep=keep)
