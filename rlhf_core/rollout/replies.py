"""Replies to many prompts, sampled by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.models.saving import stop_tokens
from rlhf_core.rollout.generate import generate
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.runtime.distributed import Group, computes_in_bf16


@dataclass(frozen=True)
class Reply:
    """One sampled reply."""

    ids: list[int]
    """Token ids, with the end-of-turn token if there is one."""
    logprob: float
    """Nats, under the sampled distribution."""
    finished: bool
    """Ended with an end-of-turn token, not at the length limit."""

    def text(self, tokenizer: Any) -> str:
        """Without the end-of-turn token and surrounding space."""
        return str(tokenizer.decode(self.ids, skip_special_tokens=True)).strip()


def fast_inference(group: Group) -> Any:
    """bf16 autocast where the device computes in it natively."""
    bf16 = computes_in_bf16(group.device)
    return torch.autocast(group.device.type, dtype=torch.bfloat16, enabled=bf16)


def inference_dtype(device: torch.device) -> torch.dtype:
    """What models that are not trained are loaded in: bf16 on a GPU, half the memory and without
    autocast's copies; fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def sample_replies(
    model: nn.Module,
    folder: Path,
    prompt_ids: Sequence[Sequence[int]],
    group: Group,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 64,
    stream: int = 0,
    greedy: bool = False,
) -> list[Reply]:
    """One reply per prompt, in the order of the prompts; all of them on every rank.

    Args:
        model: causal LM on the group's device. folder: its files, for the stop tokens.
        seed, stream: a reply depends on them and on its index in the list, not on the rank.
        batch_size: rows decoded at a time on one rank.
        greedy: always the likeliest token; the random numbers are then not used.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    mine = order[group.rank :: group.size]
    with fast_inference(group):
        rollout = generate(
            model,
            [prompt_ids[i] for i in mine],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=stop_tokens(folder),
            pad_id=0,
            row_seeds=None if greedy else make_row_seeds(seed, stream, mine),
            greedy=greedy,
            batch_size=batch_size,
        ).cpu()
    replies = [
        Reply(
            rollout.response_ids[i][rollout.response_mask[i]].tolist(),
            float(rollout.logprobs[i].sum()),
            bool(rollout.finished[i]),
        )
        for i in range(len(mine))
    ]
    result: list[Any] = [None] * len(prompt_ids)
    for position, reply in zip(order, group.interleave(replies), strict=True):
        result[position] = reply
    return result
