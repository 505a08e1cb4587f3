"""The rollout of an online algorithm: one reply to every prompt of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.jobs import OnlineJob
from rlhf_core.models.saving import stop_tokens
from rlhf_core.rollout.generate import generate, make_row_seeds
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.training.strategy import Strategy


def roll_out(
    job: OnlineJob,
    strategy: Strategy,
    policy: nn.Module,
    source: Path,
    prompt_ids: list[list[int]],
    step: int,
    engine: VllmEngine | None = None,
) -> dict[str, Any]:
    """Sample one reply to every prompt of the global batch, each rank its share.

    Args:
        policy: the causal LM. source: its files.
        prompt_ids: a prompt that stands there more than once gets as many different replies.
        engine: of `start_engine`; None: the built-in loop.

    Returns:
        On every rank, in the order of the prompts: sequences, prompt_lengths, finished, logprobs.
    """
    group = strategy.group
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    mine = order[group.rank :: group.size]
    options: dict[str, Any] = {
        "max_new_tokens": job.max_new_tokens, "temperature": job.temperature,
        "eos_ids": stop_tokens(source), "pad_id": 0,
        "row_seeds": make_row_seeds(job.seed, step, mine),
    }  # fmt: skip
    prompts = [prompt_ids[i] for i in mine]
    if engine is not None:
        rollout = engine.roll_out(policy, prompts, **options)
    else:
        with strategy.autocast():
            rollout = generate(policy, prompts, **options)
    results = []
    for i in range(len(mine)):
        real = rollout.response_mask[i]
        results.append(
            (
                rollout.response_ids[i][real].tolist(),
                rollout.logprobs[i][real].tolist(),
                bool(rollout.finished[i]),
            )
        )
    replies: list[Any] = [None] * len(prompt_ids)
    for position, reply in zip(order, group.interleave(results), strict=True):
        replies[position] = reply
    return {
        "sequences": [[*p, *r[0]] for p, r in zip(prompt_ids, replies, strict=True)],
        "prompt_lengths": [len(p) for p in prompt_ids],
        "logprobs": [r[1] for r in replies],
        "finished": torch.tensor([r[2] for r in replies]),
    }
