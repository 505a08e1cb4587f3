"""Sampling from a policy whose parameters are spread over the ranks (`rlhf_core.nn.sharded`).

Two ways, with the same replies. *Gathered*: the whole policy is put together on every rank, once
per rollout, in the precision of its passes; it decodes as an unsharded one does. *Layer by layer*:
every pass gathers each layer and frees it, which fits any model and takes a transfer of the whole
policy per token. Ranks then decode in step: before a pass each says whether it has one to run, and
those that have finished run an empty one until none is left.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core.nn.backbone import backbone, causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.probe_model import eval_mode
from rlhf_core.nn.sharded import gathered, gathered_bytes, is_sharded, release
from rlhf_core.rollout.generate import Rollout, generate
from rlhf_core.runtime.distributed import Group
from rlhf_core.system import machine
from rlhf_core.system.host_memory import format_bytes

GATHER_SHARE = 0.5
"""Share of a rank's free memory that a gathered policy may take; the rest is for keys, values and
activations."""

_said: set[str] = set()


def generate_together(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], group: Group, **options: Any
) -> Rollout:
    """`generate` for this rank's prompts. Every rank calls, also one without prompts.

    Args:
        options: further arguments of `generate`.
    """
    if not is_sharded(policy):
        return generate(policy.model, prompt_ids, **options)
    if fits(policy, group):
        with gathered(policy):
            return policy.within(lambda: generate(policy.model, prompt_ids, **options))
    in_step = InStep(policy, group)

    def decode() -> Rollout:
        rollout = generate(policy.model, prompt_ids, before_pass=in_step.begin, **options)
        in_step.wait_for_others()
        return rollout

    try:
        return policy.within(decode)
    finally:
        release(policy)


def fits(policy: Policy, group: Group) -> bool:
    """Whether the gathered policy fits into `GATHER_SHARE` of every rank's free memory."""
    needed = gathered_bytes(policy)
    free = min(group.gather(free_memory(group.device)))
    fit = needed <= GATHER_SHARE * free
    way = "once per rollout" if fit else "layer by layer for each token"
    _say(
        f"fsdp2: rollouts gather the policy {way}: it takes {format_bytes(needed)}, and at most "
        f"{format_bytes(int(GATHER_SHARE * free))} of what is free",
        way, group,
    )  # fmt: skip
    return fit


def _say(text: str, key: str, group: Group) -> None:
    """Once per way, on rank 0."""
    if group.rank == 0 and key not in _said:
        _said.add(key)
        print(text, flush=True)


def free_memory(device: torch.device) -> int:
    """Bytes that this rank can still allocate, on its GPU or as its share of main memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return machine.free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class InStep:
    """Passes of all ranks, one after another, as many on each."""

    def __init__(self, policy: Policy, group: Group) -> None:
        self._policy, self._group = policy, group

    def begin(self) -> None:
        """Before each pass of this rank."""
        self._group.any(True)

    def wait_for_others(self) -> None:
        """After this rank's last pass: take part in those of the others."""
        while self._group.any(False):
            self._empty_pass()

    @torch.no_grad()
    def _empty_pass(self) -> None:
        base = backbone(causal_lm(self._policy.model))
        one = torch.zeros(1, 1, dtype=torch.long, device=self._group.device)
        with eval_mode(base):
            base(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False)
