"""Replies with which a reward model's scores are normalised, and their scores' mean and spread."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.jobs import RewardJob
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.models.saving import stop_tokens
from rlhf_core.nn.modules import Policy, ScalarModel
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.rollout.sharded import generate_together
from rlhf_core.runtime.context import StageContext
from rlhf_core.training.policy import frozen_storage
from rlhf_core.training.scoring import score_all
from rlhf_core.training.strategy import HALF, Strategy


def sft_replies(
    job: RewardJob, context: StageContext, strategy: Strategy, source: Path, train: Rows
) -> list[list[int]]:
    """Prompt + SFT reply of the first `normalization_prompts` training prompts, as token ids.

    Pairs that were sampled from this very model are such replies already, each of which counts
    once; else one reply to each prompt is sampled.
    """
    pairs = pairs_by_prompt(train, job.normalization_prompts)
    prompts = [list(ids) for ids in pairs]
    sampled = context.store.get(job.data).metadata.get("sampled_from") == job.model
    if sampled:
        replies = (
            (prompt, tuple(row[key]))
            for prompt, rows in pairs.items()
            for row in rows
            for key in ("chosen_ids", "rejected_ids")
        )
        return [[*prompt, *reply] for prompt, reply in dict.fromkeys(replies)]
    dtype, *how = frozen_storage(job, strategy)
    if strategy.sharded and strategy.precision in HALF:  # which is then what it computes in
        dtype = HALF[strategy.precision]
    policy = Policy(load_causal_lm(source, dtype, *how)).requires_grad_(False)
    strategy.place_frozen(policy)
    tokenizer = load_tokenizer(source, is_trusted(source))
    group = strategy.group
    mine = list(range(len(prompts)))[group.rank :: group.size]
    with strategy.autocast():
        rollout = generate_together(
            policy,
            [prompts[i] for i in mine],
            group,
            max_new_tokens=job.max_new_tokens,
            eos_ids=stop_tokens(source),
            pad_id=tokenizer.pad_token_id or 0,
            row_seeds=make_row_seeds(job.seed, 0, mine),
        ).cpu()
    replies = [rollout.response_ids[i][rollout.response_mask[i]].tolist() for i in range(len(mine))]
    del policy
    gc.collect()  # a sharded module refers to itself, and its memory is needed now
    whole = group.interleave(replies)
    return [[*prompt, *reply] for prompt, reply in zip(prompts, whole, strict=True)]


def pairs_by_prompt(
    rows: Iterable[Mapping[str, Any]], count: int
) -> dict[tuple[int, ...], list[Mapping[str, Any]]]:
    """The pairs of the first `count` different prompts, by the prompts' token ids.

    Pairs are read until one more prompt is found: those of a prompt are neighbours where they were
    sampled.
    """
    found: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        if prompt not in found and len(found) == count:
            break
        found.setdefault(prompt, []).append(row)
    return found


def score_mean_and_std(
    module: ScalarModel, sequences: Sequence[Sequence[int]], strategy: Strategy, micro: int
) -> tuple[float, float]:
    """Mean and standard deviation of the scores of sequences; 1 for a single one. Every rank calls.

    Args:
        micro: sequences in one pass on one rank.
    """
    scores = score_all(module, sequences, strategy, micro)  # (n,)
    return float(scores.mean()), float(scores.std()) if len(scores) > 1 else 1.0
