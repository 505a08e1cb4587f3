"""Starts the sampling engine (vLLM), where the job asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import ConfigError
from rlhf_core.jobs import OnlineJob, VllmRollout
from rlhf_core.rollout.limits import path_problem, rollout_problems
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.runtime.context import StageContext
from rlhf_core.training.strategy import Strategy


def start_engine(
    job: OnlineJob, strategy: Strategy, source: Path, prompts: Sequence[Rows], context: StageContext
) -> VllmEngine | None:
    """The engine that the job asks for, asleep, or None for the built-in loop. Every rank calls.

    It is closed before the stage's result is published, or when the stage fails.

    Raises:
        ConfigError: vLLM is not installed, or cannot do what the job asks for.
    """
    if not isinstance(job.rollout, VllmRollout):
        return None
    device = strategy.device.type
    problems = rollout_problems(job.algorithm, job, job.resources, device=device)
    if device == "cpu" and (problem := path_problem()) is not None:
        problems.append(problem)
    if problems:
        raise ConfigError("; ".join(problems))
    engine = VllmEngine(
        source,
        job.rollout,
        precision=strategy.precision,  # fp32 where the processor has no bf16
        device=strategy.device,
        rank=strategy.rank,
        longest=max(int(rows.lengths("prompt_ids").max()) for rows in prompts if len(rows))
        + job.response_tokens,
        together=-(-job.replies * job.rollout.tensor_parallel // strategy.world_size),
    )
    context.closing.callback(engine.close)
    engine.sleep()
    context.log(f"rollouts by vLLM {engine.version} on {strategy.device.type}")
    return engine
