"""Measures one model: its replies to the held-out prompts, their scores, the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.templates import prompt_ids
from rlhf_core.jobs import EvaluateJob
from rlhf_core.jobs.results import GeneralQuestion
from rlhf_core.nn.ensemble import RewardEnsemble, combine_scores, disagreement
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import mark_from
from rlhf_core.rollout.replies import Reply, fast_inference, sample_replies
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.batching import split_batch
from rlhf_core.training.language_modelling import collate, trained_tokens
from rlhf_core.training.reading import read_rows

Sequences = list[tuple[list[int], int]]  # prompt + reply, and the prompt's length


@dataclass(frozen=True)
class Inputs:
    """What an evaluation reads.

    Attributes:
        rows: held-out prompts.
        sft_rows: held-out rows for the language-modelling loss, if the job names a data set.
        asked: general questions. tokenizer: of all models.
        folders: name of a model -> its files.
        start: the model that the alignment started from: the reference.
    """

    rows: list[dict[str, Any]]
    sft_rows: Rows | None
    asked: tuple[GeneralQuestion, ...]
    tokenizer: Any
    folders: dict[str, Path]
    start: str


@dataclass(frozen=True)
class Measured:
    """What was measured of one model, with an entry for each prompt.

    Attributes:
        rewards: of the reward model, or of several together; empty without one.
        disagreement: standard deviation over several reward models; empty without several.
        kl: to the reference, nats per reply.
        losses, tokens: of each held-out row, in nats and trained tokens; empty without such rows.
        greedy: the same of greedy replies to the first prompts, without KL and losses.
        answers: greedy replies to the general questions.
    """

    replies: list[Reply]
    rewards: list[float]
    disagreement: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    greedy: Measured | None = None
    answers: list[Reply] = field(default_factory=list)


def measure(
    job: EvaluateJob,
    inputs: Inputs,
    group: Group,
    folder: Path,
    stream: int,
    model: Policy,
    reference: Policy,
    reward: RewardEnsemble | None,
) -> Measured:
    """Sample one model's replies to all prompts and score them, by all ranks together.

    Args:
        folder: the model's files. stream: a number of its own, for the random numbers.
    """
    micro = job.resources.micro_batch_size
    prompts = [row["prompt_ids"] for row in inputs.rows]
    replies = sample_replies(
        model.model, folder, prompts, group, seed=job.seed, stream=stream,
        max_new_tokens=job.max_new_tokens, temperature=job.temperature,
    )  # fmt: skip
    # greedy replies and answers are decoded together: two small batches would take twice as long
    some = prompts[: job.greedy_prompts]
    asked = [
        prompt_ids(inputs.tokenizer, [{"role": "user", "content": question.question}])
        for question in inputs.asked
    ]
    likeliest = sample_replies(
        model.model, folder, [*some, *asked], group, seed=job.seed,
        max_new_tokens=job.max_new_tokens, temperature=1.0, greedy=True,
    )  # fmt: skip
    greedy, answers = likeliest[: len(some)], likeliest[len(some) :]
    with fast_inference(group):
        scores, kl = score_replies(
            _sequences(prompts, replies), model, reference, reward, group, micro, job.temperature
        )
        of_greedy, _ = score_replies(
            _sequences(some, greedy), reference, reference, reward, group, micro, 1.0
        )
        losses, tokens = heldout_losses(model, inputs.sft_rows, group, micro)
    return Measured(
        replies, *_rewards(scores, job), kl, losses, tokens,
        greedy=Measured(greedy, *_rewards(of_greedy, job)) if some else None, answers=answers,
    )  # fmt: skip


def _sequences(prompts: Sequence[list[int]], replies: Sequence[Reply]) -> Sequences:
    return [([*p, *r.ids], len(p)) for p, r in zip(prompts, replies, strict=True)]


def _rewards(scores: Tensor, job: EvaluateJob) -> tuple[list[float], list[float]]:
    """Reward and disagreement of each reply, from the scores (k,n) of k reward models."""
    rewards = combine_scores(scores, job).tolist() if len(scores) else []
    return rewards, disagreement(scores).tolist() if len(scores) > 1 else []


@torch.no_grad()
def score_replies(
    sequences: Sequences,
    policy: Policy,
    reference: Policy,
    reward: RewardEnsemble | None,
    group: Group,
    micro: int,
    temperature: float,
) -> tuple[Tensor, list[float]]:
    """Scores (k,n) fp64 by each of k reward models, perhaps none, and KL to the reference (k1,
    nats) of every sequence, in order, on every rank."""
    members = 0 if reward is None else len(reward.members)
    found: list[list[tuple[list[int], Tensor]]] = [[] for _ in range(members)]
    kls = []
    for indices in split_batch([len(s) for s, _ in sequences], group, micro):
        ids, prompt_lengths = zip(*(sequences[i] for i in indices), strict=True)
        batch = mark_from(ids, prompt_lengths, group.device)  # (b,S) each
        kl = torch.zeros(len(indices), device=group.device)  # (b,)
        if reward is not None:
            each = reward.each(batch.input_ids, batch.mask, batch.index)  # (k,b)
            for of_member, scores in zip(found, each, strict=True):
                of_member.append((indices, scores))
        if policy is not reference:
            log_ratio = policy(*batch, temperature) - reference(*batch, temperature)  # (b,S)
            kl = log_ratio.sum(dim=1)  # (b,)
        kls.append((indices, kl))
    scores = torch.tensor([group.in_order(read_rows(f)) for f in found], dtype=torch.float64)
    return scores, group.in_order(read_rows(kls))


@torch.no_grad()
def heldout_losses(
    model: Policy, rows: Rows | None, group: Group, micro: int
) -> tuple[list[float], list[int]]:
    """Loss (nats, summed over the trained tokens) and trained tokens of each row, in order, on
    every rank; empty without rows."""
    if not rows:
        return [], []
    losses, tokens = [], []
    for indices in split_batch(rows.lengths("input_ids").tolist(), group, micro):
        taken = rows.take(indices)
        logprobs = model(*collate(taken, group.device))  # (b,S)
        losses.append((indices, -logprobs.double().sum(dim=1)))
        tokens += list(zip(indices, map(trained_tokens, taken), strict=True))
    return group.in_order(read_rows(losses)), group.in_order(tokens)
