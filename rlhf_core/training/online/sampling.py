"""The rollout of a step: replies to its prompts, sampled by all ranks together."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_core.data.rows.row import Message
from rlhf_core.jobs import OnlineJob
from rlhf_core.jobs.distillation import DistillJob
from rlhf_core.models.saving import stop_tokens
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.sharded import is_sharded
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.rollout.sharded import generate_together
from rlhf_core.training.online.ahead import Ahead
from rlhf_core.training.online.curriculum import rows_of_step
from rlhf_core.training.online.engine import Engine
from rlhf_core.training.online.episodes import EpisodeSampler, Outcome
from rlhf_core.training.online.samplers import Samplers, SamplingStopped
from rlhf_core.training.online.service_rewards import asking
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
    outcomes: list[Outcome] | None = None  # B, of the environment; None: there is none
    # (B,T) long, steps between the weights that sampled a token and those that are trained on it,
    # 0 at padding. None: 0.
    staleness: Tensor | None = None
    # (B,) of each reward but the reward model, and failures. None: they were not asked yet.
    rule_scores: tuple[dict[str, Tensor], dict[str, int]] | None = None

    def sampled_ids(self) -> list[list[int]]:
        """The tokens of each response that the policy sampled."""
        responses = [s[n:] for s, n in zip(self.sequences, self.prompt_lengths, strict=True)]
        if self.trained is None:
            return responses
        return [
            [token for token, own in zip(ids, marks, strict=True) if own]
            for ids, marks in zip(responses, self.trained, strict=True)
        ]

    def last_turn(self, index: int) -> tuple[list[Message], list[int]]:
        """The conversation before the last reply of a response, and that reply's tokens."""
        response = self.sequences[index][self.prompt_lengths[index] :]
        if self.outcomes is None:
            return json.loads(self.rows[index]["prompt"]), response
        outcome = self.outcomes[index]
        return outcome.messages, response[outcome.last :]


def sample(
    stage: OnlineStage,
    step: int,
    replies_per_prompt: int = 1,
) -> GlobalRollout:
    """Sample replies to the prompts of a step (from 0); those to one prompt are neighbours.

    Raises:
        Preempted: the job was told to stop meanwhile.
    """
    rows = rows_of(stage, step, replies_per_prompt)
    if isinstance(stage.engine, Ahead):
        return sample_ahead(stage, stage.engine, step, rows)
    return sample_between_updates(stage, rows, step, step)


def sample_between_updates(
    stage: OnlineStage, rows: list[dict[str, Any]], stream: int, step: int
) -> GlobalRollout:
    """`sample_rows` after `step` finished steps: if the job is told to stop meanwhile, a checkpoint
    of them is stored.

    Raises:
        Preempted: it was.
    """
    try:
        rollout = sample_rows(stage, rows, stream)
    except SamplingStopped:
        stage.checkpointer.stop_if_asked(step)
        raise
    stage.checkpointer.stop_if_asked(step)
    return rollout


def rows_of(stage: OnlineStage, step: int, replies_per_prompt: int) -> list[dict[str, Any]]:
    """A row for each reply of a step; those to one prompt are neighbours."""
    rows = stage.inputs.prompts.take(rows_of_step(stage, step))
    return [row for row in rows for _ in range(replies_per_prompt)]


def sample_ahead(
    stage: OnlineStage,
    ahead: Ahead,
    step: int,
    rows: list[dict[str, Any]],
) -> GlobalRollout:
    """The replies to a step's rows, which were begun in earlier steps."""
    began, same = time.perf_counter(), len(rows) // stage.job.batch_size

    def prompts_of(number: int) -> list[list[int]]:
        found = rows_of(stage, number, same)
        ask = asking(stage.models.services, stage.models.tokenizer, found)
        if ask is not None:
            ahead.asks[number] = ask
        return [row["prompt_ids"] for row in found]

    replies = ahead.take(step, stage.models.trained.policy, prompts_of)
    stage.checkpointer.stop_if_asked(step)
    assert replies is not None, "sampling was broken off, but nobody was told to stop"
    sampled = [SampledReply(r.ids, r.logprobs, r.finished) for r in replies]
    ages = [step - torch.tensor(r.versions) for r in replies]  # (T',) each
    return replace(
        global_rollout(rows, sampled, began), staleness=pad_sequence(ages, batch_first=True)
    )


def global_rollout(
    rows: list[dict[str, Any]], replies: list[SampledReply], began: float
) -> GlobalRollout:
    """Rows and their replies.

    Args:
        began: time.perf_counter() before sampling.
    """
    prompt_ids = [row["prompt_ids"] for row in rows]
    return GlobalRollout(
        rows=rows,
        sequences=[[*p, *r.ids] for p, r in zip(prompt_ids, replies, strict=True)],
        prompt_lengths=[len(p) for p in prompt_ids],
        logprobs=[r.logprobs for r in replies],
        finished=torch.tensor([r.finished for r in replies]),
        began=began,
        seconds=time.perf_counter() - began,
    )


def sample_rows(
    stage: OnlineStage,
    rows: list[dict[str, Any]],
    stream: int,
) -> GlobalRollout:
    """Sample a reply to the prompt of each row.

    Args:
        stream: of the random numbers; a step, or a number that is none.
    """
    if stage.environments is not None:
        return sample_episodes(stage, rows, stream)
    began = time.perf_counter()
    prompt_ids = [row["prompt_ids"] for row in rows]
    ask = asking(stage.models.services, stage.models.tokenizer, rows)
    replies = roll_out(
        stage.job, stage.strategy, stage.models.trained.policy, stage.inputs.source,
        prompt_ids, stream, stage.engine, ask,
    )  # fmt: skip
    return global_rollout(rows, replies, began)


def sample_episodes(stage: OnlineStage, rows: list[dict[str, Any]], stream: int) -> GlobalRollout:
    """An episode for each row, over all ranks. The arguments are those of `sample_rows`."""
    began = time.perf_counter()
    job, strategy, policy = stage.job, stage.strategy, stage.models.trained.policy
    group = strategy.group
    assert stage.environments is not None
    sampler = EpisodeSampler(job, stage.environments, stage.models.tokenizer, stream)
    # Ranks that share their layers, or an engine, sample as many turns.
    together = is_sharded(policy) or stage.engine is not None
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt_ids"]))
    episodes = sampler.run(
        [(i, rows[i]) for i in order[group.rank :: group.size]],
        partial(sample_own, job, strategy, policy, stage.inputs.source, engine=stage.engine),
        group.any if together else bool,
    )
    found = [(e.prompt, e.ids, e.logprobs, e.trained, e.finished, e.outcome()) for e in episodes]
    by_index = dict(zip(order, group.interleave(found), strict=True))
    prompts, ids, logprobs, trained, finished, outcomes = zip(
        *(by_index[i] for i in range(len(rows))), strict=True
    )
    return GlobalRollout(
        rows=rows,
        sequences=[[*p, *r] for p, r in zip(prompts, ids, strict=True)],
        prompt_lengths=[len(p) for p in prompts],
        logprobs=list(logprobs),
        finished=torch.tensor(finished),
        began=began,
        seconds=time.perf_counter() - began,
        trained=list(trained),
        outcomes=list(outcomes),
    )


def roll_out(
    job: OnlineJob | DistillJob,
    strategy: Strategy,
    policy: Policy,
    source: Path,
    prompt_ids: list[list[int]],
    step: int,
    engine: Engine | None = None,
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
    engine = engine.samplers if isinstance(engine, Ahead) else engine
    if isinstance(engine, Samplers):
        seeds = make_row_seeds(job.seed, step, range(len(prompt_ids)))
        replies = engine.roll_out(policy, prompt_ids, seeds, on_finished)
        return [SampledReply(r.ids, r.logprobs, r.finished) for r in replies]
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    alike = 1 if engine is None else engine.tensor_parallel  # ranks that must sample the same
    mine = order[group.rank // alike :: group.size // alike]
    told = None if on_finished is None or group.rank % alike else numbered_by(mine, on_finished)
    prompts, seeds = [prompt_ids[i] for i in mine], make_row_seeds(job.seed, step, mine)
    own = sample_own(job, strategy, policy, source, prompts, seeds, engine, told)
    return group.in_order(zip(mine, own, strict=True))


def sample_own(
    job: OnlineJob | DistillJob,
    strategy: Strategy,
    policy: Policy,
    source: Path,
    prompts: list[list[int]],
    row_seeds: list[int],
    engine: Engine | None = None,
    on_finished: OnFinished | None = None,
) -> list[SampledReply]:
    """One reply to each of this rank's prompts, in their order. See `roll_out`.

    Args:
        row_seeds: one for each prompt. on_finished: gets the index among these prompts.
    """
    options: dict[str, Any] = {
        "max_new_tokens": job.max_new_tokens, "temperature": job.temperature,
        "eos_ids": stop_tokens(source), "pad_id": 0, "row_seeds": row_seeds,
    }  # fmt: skip
    if on_finished is not None:
        options["on_finished"] = on_finished
    engine = engine.samplers if isinstance(engine, Ahead) else engine
    if isinstance(engine, Samplers):
        return sampled_for_ranks(engine, policy, prompts, row_seeds)
    if engine is not None:
        sampled = engine.roll_out(policy, prompts, **options)
    else:
        with strategy.autocast():
            sampled = generate_together(policy, prompts, strategy.group, **options)
    sampled = sampled.cpu()
    own = []
    for i in range(len(prompts)):
        real = sampled.response_mask[i]  # (T,)
        ids, logprobs = sampled.response_ids[i][real], sampled.logprobs[i][real]
        own.append(SampledReply(ids.tolist(), logprobs.tolist(), bool(sampled.finished[i])))
    return own


def sampled_for_ranks(
    samplers: Samplers, policy: Policy, prompts: list[list[int]], row_seeds: list[int]
) -> list[SampledReply]:
    """This rank's replies, of those that rank 0 asks the samplers for. Every rank calls."""
    group = samplers.strategy.group
    parts = group.gather((prompts, row_seeds))
    replies = samplers.roll_out(
        policy, [p for given, _ in parts for p in given], [s for _, given in parts for s in given]
    )
    first = sum(len(given) for given, _ in parts[: group.rank])
    mine = replies[first : first + len(prompts)]
    return [SampledReply(r.ids, r.logprobs, r.finished) for r in mine]


def numbered_by(indices: list[int], on_finished: OnFinished) -> OnFinished:
    """The same, where reply i of a rank is reply indices[i] of the global batch."""

    def renumbered(replies: list[FinishedReply]) -> None:
        on_finished([reply._replace(row=indices[reply.row]) for reply in replies])

    return renumbered
