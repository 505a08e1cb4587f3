"""The rollout of a step: replies to its prompts, sampled by all ranks together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_core.jobs import OnlineJob
from rlhf_core.jobs.distillation import DistillJob
from rlhf_core.models.saving import stop_tokens
from rlhf_core.nn.modules import Policy
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.rollout.sharded import generate_together
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.strategy import Strategy


class SampledReply(NamedTuple):
    """One reply; its tokens end with the first end-of-turn token or at the length limit."""

    ids: list[int]
    logprobs: list[float]  # nats, one for each token
    finished: bool  # ended with an end-of-turn token


@dataclass(frozen=True)
class GlobalRollout:
    """The B replies of a step over all ranks, on every rank."""

    rows: list[dict[str, Any]]  # B rows of the prompt data set, one for each reply
    sequences: list[list[int]]  # B x (prompt + response) token ids
    prompt_lengths: list[int]  # B, tokens
    logprobs: list[list[float]]  # B x response length, nats, of the engine that sampled
    finished: Tensor  # (B,) bool, ended with an end-of-turn token
    began: float  # time.perf_counter() before sampling
    seconds: float  # that sampling took
    # B x response length: whether the policy sampled each token; an environment wrote the others,
    # whose logprobs are 0. None: it sampled all.
    trained: list[list[bool]] | None = None

    def sampled_ids(self) -> list[list[int]]:
        """The tokens of each response that the policy sampled."""
        responses = [s[n:] for s, n in zip(self.sequences, self.prompt_lengths, strict=True)]
        if self.trained is None:
            return responses
        return [
            [token for token, own in zip(ids, marks, strict=True) if own]
            for ids, marks in zip(responses, self.trained, strict=True)
        ]


def sample(
    stage: OnlineStage,
    step: int,
    replies_per_prompt: int = 1,
    on_finished: OnFinished | None = None,
) -> GlobalRollout:
    """Sample replies to the prompts of a step (from 0); those to one prompt are neighbours.

    Args:
        on_finished: see `roll_out`.

    Raises:
        Preempted: the job was told to stop meanwhile.
    """
    job, prompts = stage.job, stage.inputs.prompts
    rows = prompts.take(batch_rows(prompts, job.batch_size, step, job.seed))
    rows = [row for row in rows for _ in range(replies_per_prompt)]
    rollout = sample_rows(stage, rows, step, on_finished)
    stage.checkpointer.stop_if_asked(step)
    return rollout


def sample_rows(
    stage: OnlineStage,
    rows: list[dict[str, Any]],
    stream: int,
    on_finished: OnFinished | None = None,
) -> GlobalRollout:
    """Sample a reply to the prompt of each row.

    Args:
        stream: of the random numbers; a step, or a number that is none.
        on_finished: see `roll_out`.
    """
    began = time.perf_counter()
    prompt_ids = [row["prompt_ids"] for row in rows]
    replies = roll_out(
        stage.job, stage.strategy, stage.models.trained.policy, stage.inputs.source,
        prompt_ids, stream, stage.engine, on_finished,
    )  # fmt: skip
    return GlobalRollout(
        rows=rows,
        sequences=[[*p, *r.ids] for p, r in zip(prompt_ids, replies, strict=True)],
        prompt_lengths=[len(p) for p in prompt_ids],
        logprobs=[r.logprobs for r in replies],
        finished=torch.tensor([r.finished for r in replies]),
        began=began,
        seconds=time.perf_counter() - began,
    )


def roll_out(
    job: OnlineJob | DistillJob,
    strategy: Strategy,
    policy: Policy,
    source: Path,
    prompt_ids: list[list[int]],
    step: int,
    engine: VllmEngine | None = None,
    on_finished: OnFinished | None = None,
) -> list[SampledReply]:
    """One reply to every prompt of the global batch, in their order, on every rank.

    Args:
        policy: what is sampled from. source: its files.
        prompt_ids: a prompt that comes more than once gets as many different replies.
        engine: of `start_engine`; None: the built-in loop.
        on_finished: is handed each reply when it ends, on the rank that sampled it, with its index
            in the global batch as its row.
    """
    group = strategy.group
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    alike = 1 if engine is None else engine.tensor_parallel  # ranks that must sample the same
    mine = order[group.rank // alike :: group.size // alike]
    options: dict[str, Any] = {
        "max_new_tokens": job.max_new_tokens, "temperature": job.temperature,
        "eos_ids": stop_tokens(source), "pad_id": 0,
        "row_seeds": make_row_seeds(job.seed, step, mine),
    }  # fmt: skip
    if on_finished is not None and group.rank % alike == 0:
        options["on_finished"] = numbered_by(mine, on_finished)
    prompts = [prompt_ids[i] for i in mine]
    if engine is not None:
        sampled = engine.roll_out(policy.model, prompts, **options)
    else:
        with strategy.autocast():
            sampled = generate_together(policy, prompts, group, **options)
    sampled = sampled.cpu()
    own = []
    for i in range(len(mine)):
        real = sampled.response_mask[i]  # (T,)
        ids, logprobs = sampled.response_ids[i][real], sampled.logprobs[i][real]
        own.append(SampledReply(ids.tolist(), logprobs.tolist(), bool(sampled.finished[i])))
    return group.in_order(zip(mine, own, strict=True))


def numbered_by(indices: list[int], on_finished: OnFinished) -> OnFinished:
    """The same, where reply i of a rank is reply indices[i] of the global batch."""

    def renumbered(replies: list[FinishedReply]) -> None:
        on_finished([reply._replace(row=indices[reply.row]) for reply in replies])

    return renumbered
