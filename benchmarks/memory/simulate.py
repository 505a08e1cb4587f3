"""Peak memory of one rank in an optimizer step of two micro-batches, by simulation."""

from __future__ import annotations

import gc
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory.cases import Case
from benchmarks.memory.compare import estimated
from benchmarks.memory.fake import LiveBytes
from benchmarks.memory.gpu_kernels import fused_norm, quantize
from benchmarks.memory.layouts import HALF, FullySharded, Replicated, Zero
from rlhf_core.nn import chunked_logprobs, fused_norms
from rlhf_core.nn.fast_paths import FastPath, patched
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import ActorCritic, Policy, ScalarModel
from rlhf_core.nn.sharded import shard
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import enable_checkpointing

PHASES = ("forward", "backward", "step")


_LAYER_NORM = functional.layer_norm


def _layer_norm(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    """In fp32 under autocast, as on a GPU; a CPU's autocast leaves it in half precision."""
    return _LAYER_NORM(x.float() if torch.is_autocast_enabled("cpu") else x, *rest, **options)


def _logsumexp(x: Tensor, dim: int, out: Tensor) -> None:
    """As torch's operator works inside, with one tensor of the size of x."""
    largest = x.amax(dim, keepdim=True)
    out.copy_((x - largest).exp_().sum(dim).log_().add_(largest.squeeze(dim)))


_ANSWERS = (
    (chunked_logprobs, "_kind", lambda _: "other"),  # chunks of logits as on a GPU
    (torch, "logsumexp", _logsumexp),
    (functional, "layer_norm", _layer_norm),
    (FastPath, "works", lambda *_: True),  # trials compare numbers, and here are none
)


def simulated(case: Case) -> tuple[Case, dict[str, int]]:
    """The case and its `peak`; says how it compares with the estimate."""
    began = time.monotonic()
    found = peak(case)
    share = estimated(case) / max(found.values())
    print(f"{share:.2f} {case} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return case, found


def peak(case: Case) -> dict[str, int]:
    """The most bytes alive in each phase, for all layers of the model."""
    # All layers are alike: from here on, the peaks lie on straight lines. In a small model with a
    # tied head the end of the backward pass is the peak, and in a large one its beginning.
    least = 3 if case.strategy == "fsdp2" else 2
    if case.strategy == "ddp" and case.config.get("tie_word_embeddings") and case.tuning == "full":
        least = 6
    few, more = (phases(case, layers) for layers in (least, least + 1))
    name = "n_layer" if "n_layer" in case.config else "num_hidden_layers"
    further = case.config[name] - least
    return {p: few[p] + (more[p] - few[p]) * further for p in PHASES}


def phases(case: Case, layers: int) -> dict[str, int]:
    """The most bytes alive in each phase, for a model of some layers."""
    live = LiveBytes()
    mesh = None
    if case.strategy == "fsdp2":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
        mesh = dist.device_mesh.init_device_mesh("cpu", (case.ranks,))
    try:
        with patched(*_ANSWERS), live.counting():
            _train(case, layers, live, mesh)
    finally:
        if mesh is not None:
            dist.destroy_process_group()
    return {p: live.peaks[p] for p in PHASES}


def _train(case: Case, layers: int, live: LiveBytes, mesh: Any) -> None:
    module, frozen = _modules(case, layers)
    optimizer_of = lambda: adamw(module, case.settings(), {"": 1e-5})  # noqa: E731
    if case.strategy == "fsdp2":
        shard(module, mesh, HALF, trained=True)
        for model in frozen:
            shard(model, mesh, None, trained=False)
        layout: Any = FullySharded(module, optimizer_of())
    elif case.strategy == "ddp":
        layout = Replicated(module, optimizer_of())
    else:
        module.to(HALF)
        layout = Zero(module, optimizer_of(), case.ranks, int(case.strategy[-1]))
    layout.warm_up()
    ids, mask, wanted = _batch(case)
    gc.collect()  # modules before they were sharded hold each other
    live.phase("forward")
    with layout.forward():
        loss = _loss(case, module, ids, mask, wanted)
        live.phase("backward")
        layout.backward(loss)
    del loss
    live.phase("step")
    layout.step()


def _modules(case: Case, layers: int) -> tuple[nn.Module, list[nn.Module]]:
    """The module that is trained, and frozen ones beside it."""
    settings = case.settings()

    def model(dtype: torch.dtype = torch.float32) -> Any:
        name = "n_layer" if "n_layer" in case.config else "num_hidden_layers"
        config = AutoConfig.for_model(**{**case.config, name: layers})
        found = AutoModelForCausalLM.from_config(config, dtype=dtype)
        found.config.use_cache = False
        for norm in fused_norms._norms(found):  # as `fused_norms.install` does on a GPU
            norm.forward = partial(fused_norm, norm)
        return found.eval()

    def trained(whole: Any) -> nn.Module:
        chosen = choose_trainable(whole, settings, 0)
        if case.tuning == "qlora":
            quantize(chosen)
        if case.checkpointing:
            enable_checkpointing(chosen)
        return chosen

    def scalar(whole: Any) -> ScalarModel:
        return ScalarModel(whole.base_model, case.config["hidden_size"])

    # As rlhf_core.training.policy.frozen_storage has them loaded; ZeRO casts all of them itself.
    adapters = case.tuning != "full" and case.strategy == "ddp"
    start = HALF if adapters else torch.float32
    half = torch.float32 if case.strategy == "ddp" and not adapters else HALF
    if case.stage == "reward":
        module: nn.Module = scalar(model(start))
        module.backbone = trained(module.backbone)
        return module, []
    policy = Policy(trained(model(start)))
    if case.stage != "ppo":
        return policy, []
    critic = scalar(model(start))
    critic.backbone = trained(critic.backbone)
    reward = scalar(model(half)).to(half).requires_grad_(False)
    if case.tuning == "qlora":
        quantize(reward.backbone)
    frozen: list[nn.Module] = [reward]
    if case.tuning == "full":
        frozen.append(Policy(model(half)).requires_grad_(False))
    return ActorCritic(policy, critic), frozen


def _batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and loss mask, (rows,length) each."""
    rows = case.rows * (2 if case.stage in ("dpo", "reward") else 1)
    ids = torch.ones(rows, case.length, dtype=torch.long)
    wanted = torch.ones(rows, case.length, dtype=torch.bool)
    reply = getattr(case.settings(), "max_new_tokens", case.length - 1)
    wanted[:, : case.length - reply] = False
    return ids, torch.ones(rows, case.length, dtype=torch.bool), wanted


def _loss(case: Case, module: nn.Module, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """A loss that reads what the stage's loss reads; its own tensors are small."""
    if case.stage == "reward":
        return module(ids, mask).float().sum()
    found = module(ids, mask, wanted)
    if case.stage == "ppo":
        return found[0].float().sum() + found[1].float().sum()
    return found.float().sum()
