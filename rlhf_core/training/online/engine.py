"""Starts what samples, where the job asks for more than the built-in loop in the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import ConfigError
from rlhf_core.jobs import OnlineJob, VllmRollout
from rlhf_core.rollout.limits import rollout_problems
from rlhf_core.rollout.schedule import Schedule
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.online.ahead import Ahead
from rlhf_core.training.online.sampler_process import Setup
from rlhf_core.training.online.samplers import Samplers, share_cores
from rlhf_core.training.strategy import Strategy

Engine = VllmEngine | Samplers | Ahead


def start_engine(
    job: OnlineJob,
    strategy: Strategy,
    source: Path,
    prompts: Sequence[Rows],
    checkpointer: Checkpointer,
    start: int,
) -> Engine | None:
    """The engine that the job asks for, asleep; or None for the built-in loop in the ranks. Every
    rank calls, after the checkpoint is restored.

    It is closed before the stage's result is published, or when the stage fails.

    Args:
        start: finished steps.

    Raises:
        ConfigError: vLLM is not installed, or cannot do what the job asks for; too few GPUs.
    """
    context, vllm = checkpointer.context, isinstance(job.rollout, VllmRollout)
    if not (vllm or job.rollout.separate):
        return None
    longest = job.response_tokens + max(
        int(rows.lengths("prompt_ids").max()) for rows in prompts if len(rows)
    )
    if vllm:
        device = strategy.device.type
        problems = rollout_problems(job.algorithm, job, job.resources, device=device)
        if problems:
            raise ConfigError("; ".join(problems))
    if job.rollout.separate:
        return start_samplers(job, strategy, source, longest, checkpointer, start)
    assert isinstance(job.rollout, VllmRollout)
    engine = VllmEngine(
        source,
        job.rollout,
        precision=strategy.precision,  # fp32 where the processor has no bf16
        device=strategy.device,
        rank=strategy.rank,
        longest=longest,
        together=-(-job.replies * job.rollout.tensor_parallel // strategy.world_size),
    )
    context.closing.callback(engine.close)
    engine.sleep()
    context.log(f"rollouts by vLLM {engine.version} on {strategy.device.type}")
    return engine


def start_samplers(
    job: OnlineJob,
    strategy: Strategy,
    source: Path,
    longest: int,
    checkpointer: Checkpointer,
    start: int,
) -> Samplers | Ahead:
    """Processes that sample, and where they may be ahead of training what they have sampled."""
    context, rollout = checkpointer.context, job.rollout
    threads = share_cores(job)
    if strategy.device.type == "cpu" and context.rank == context.local_rank:  # the first node
        torch.set_num_threads(threads)
    setup = Setup(
        job.model_dump_json(), str(source), 0, strategy.kind, strategy.precision, threads,
        longest, -(-job.replies * rollout.segments // rollout.ranks),
    )  # fmt: skip
    samplers = Samplers(job, strategy, setup, context.scratch("weights"))
    context.closing.callback(samplers.close)
    who = f"{rollout.ranks} processes of their own" if rollout.ranks > 1 else "a process of its own"
    steps = "1 step" if rollout.max_staleness == 1 else f"{rollout.max_staleness} steps"
    context.log(f"rollouts by {who}{f', {steps} ahead' if rollout.max_staleness else ''}")
    if not rollout.max_staleness:
        return samplers
    schedule = Schedule(job.steps, rollout.max_staleness, rollout.segments, job.max_new_tokens)
    ahead = Ahead(samplers, schedule, start, checkpointer.ahead)
    checkpointer.beside = ahead.snapshot
    return ahead
