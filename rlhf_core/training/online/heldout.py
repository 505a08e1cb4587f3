"""Held-out evaluation of a policy in training: the same prompts and random numbers each time, so
that two evaluations differ by what the policy has learned in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from rlhf_core.training.online.experience import Experience, score_rollout
from rlhf_core.training.online.first_pass import FirstPass
from rlhf_core.training.online.sampling import sample_rows
from rlhf_core.training.online.scores import shape_scores
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.online.summary import summarise

STREAM = 2**32  # of the random numbers, beyond those of all steps


def steps_left(stage: OnlineStage) -> Iterator[int]:
    """The steps (from 0) that are left, until patience is at its end. Every rank calls.

    Before the first one, the untrained policy is evaluated, as step 0.
    """
    job = stage.job
    if job.eval_every is not None and stage.start == 0:
        stage.context.log_metrics(0, job.steps, evaluate(stage))
    yield from stage.selection.steps(stage.start, job.steps)


def evaluate(stage: OnlineStage) -> dict[str, float]:
    """heldout_... of everything in `summarise`, and heldout_reward_se, the standard error of
    heldout_reward, and heldout_reward/NAME of each source of a mixture; the same on every rank.
    Every rank calls.
    """
    job, prompts, ranks = stage.job, stage.inputs.heldout, stage.strategy.world_size
    count = min(job.eval_prompts, len(prompts))
    # Ranks that share their layers run as many passes: each has as many replies.
    numbers = range(len(prompts) - count, len(prompts))
    rows = prompts.take([numbers[i % count] for i in range(-(-count // ranks) * ranks)])
    rollout = sample_rows(stage, rows, STREAM)
    whole = [list(range(len(rows)))]
    experience = score_rollout(stage, rollout, whole, FirstPass(stage.models.trunk))
    if job.score_whiten:  # which would make the mean the same of any policy
        plain = job.model_copy(update={"score_whiten": False})
        weights, finished = stage.models.weights, rollout.finished
        scores = shape_scores(plain, experience.components, weights, finished)
        experience = replace(experience, scores=scores)
    experience = first_replies(experience, count)
    found = summarise(job, experience)
    found["reward_se"] = float(experience.scores.std() / count**0.5) if count > 1 else 0.0
    of_sources: dict[str, list[float]] = {}
    for row, score in zip(experience.rollout.rows, experience.scores.tolist(), strict=True):
        if "source" in row:  # of a mixture
            of_sources.setdefault(row["source"], []).append(score)
    found |= {f"reward/{name}": sum(x) / len(x) for name, x in sorted(of_sources.items())}
    return {f"heldout_{name}": value for name, value in found.items()}


def first_replies(experience: Experience, count: int) -> Experience:
    """The experience without the replies after some number."""
    rollout = experience.rollout
    tensors = {k: v[:count] for k, v in vars(experience).items() if isinstance(v, Tensor)}
    return replace(
        experience,
        **tensors,
        components={name: x[:count] for name, x in experience.components.items()},
        rollout=replace(
            rollout,
            rows=rollout.rows[:count],
            sequences=rollout.sequences[:count],
            prompt_lengths=rollout.prompt_lengths[:count],
            logprobs=rollout.logprobs[:count],
            finished=rollout.finished[:count],
            trained=None if rollout.trained is None else rollout.trained[:count],
            outcomes=None if rollout.outcomes is None else rollout.outcomes[:count],
        ),
    )
