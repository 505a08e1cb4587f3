"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose replies all have the same
outcome are replaced by replies to further prompts.

The outcome is the weighted sum of the rewards that `job.outcomes` names, not what is learned from:
a penalty for length would make every group look as if it taught something. Prompts are taken one
after another from the epochs' orders; where the data set ends, the next epoch goes on. How many
were taken stands in the metrics of each step, which every checkpoint holds: a run that was killed
goes on with the same prompts. Deviation from the paper: the number of rounds is bounded, and the
groups that are still flat stay in the rollout.

B replies of a rollout (global), G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_core.jobs.policy_gradient import GroupSettings
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.online.experience import score_by_services, score_without_model
from rlhf_core.training.online.sampling import GlobalRollout, sample, sample_between_updates
from rlhf_core.training.online.scores import weighted_sum
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.scoring import score_all

STREAM = 2**33  # of the random numbers, beyond those of all steps and of evaluations
ROUNDS = 1024  # streams of a step, more than the rounds that a job may have
TOLERANCE = 1e-6  # relative; outcomes that differ by less, as by rounding, are the same


def sample_groups(stage: OnlineStage, step: int) -> tuple[GlobalRollout, dict[str, float]]:
    """Sample a group of replies to each prompt of a step (from 0), and replace flat groups if the
    job asks for it. Every rank calls.

    Returns:
        The rollout, and metrics: groups_replaced, groups_still_flat, resample_rounds, and
        prompts_sampled since the stage began. Without dynamic sampling there are none.

    Raises:
        Preempted: the job was told to stop meanwhile.
    """
    job = stage.job
    assert isinstance(job, GroupSettings)
    if job.max_resamples == 0:
        return sample(stage, step, job.group_size), {}
    position = prompts_sampled(stage)
    rounds: list[GlobalRollout] = []
    places = [(0, group) for group in range(job.batch_size)]  # round and group, of each group
    flat = list(range(job.batch_size))  # places that need another group
    while flat and len(rounds) <= job.max_resamples:
        rows = next_prompts(stage, position, len(flat))
        position += len(rows)
        repeated = [row for row in rows for _ in range(job.group_size)]
        stream = step if not rounds else STREAM + ROUNDS * step + len(rounds)
        rollout = sample_between_updates(stage, repeated, stream, step)
        outcomes, rollout = outcomes_of(stage, job.outcomes, rollout)
        useful = [i for i, same in enumerate(flat_groups(outcomes, job.group_size)) if not same]
        if rounds:
            for place, group in zip(flat, useful, strict=False):
                places[place] = (len(rounds), group)
            flat = flat[len(useful) :]
        else:  # the useful ones are in their places already
            flat = [place for place in flat if place not in set(useful)]
        rounds.append(rollout)
    metrics = {
        "groups_replaced": float(sum(number > 0 for number, _ in places)),
        "groups_still_flat": float(len(flat)),
        "resample_rounds": float(len(rounds) - 1),
        "prompts_sampled": float(position),
    }
    return join(rounds, places, job.group_size), metrics


def prompts_sampled(stage: OnlineStage) -> int:
    """Prompts that were taken since the stage began, the same on every rank. Every rank calls.

    It follows from the last rollout's line in metrics.jsonl.
    """
    taken = 0.0
    if stage.context.main:
        lines = [line for line in stage.context.read_metrics() if "prompts_sampled" in line]
        taken = lines[-1]["prompts_sampled"] if lines else 0.0
    return int(stage.strategy.group.broadcast(taken))


def next_prompts(stage: OnlineStage, position: int, count: int) -> list[dict[str, Any]]:
    """Rows of the prompts from a position on, epoch after epoch in the order of each."""
    prompts = stage.inputs.prompts
    places = range(position, position + count)
    return prompts.take([batch_rows(prompts, 1, place, stage.job.seed)[0] for place in places])


def flat_groups(outcomes: Tensor, group_size: int) -> list[bool]:
    """Whether all outcomes (B,) of a group are the same, for each of the G groups."""
    groups = outcomes.double().view(-1, group_size)  # (G, group_size)
    highest, lowest = groups.amax(dim=1), groups.amin(dim=1)  # (G,) each
    near = TOLERANCE * torch.maximum(highest.abs(), lowest.abs())
    return [bool(same) for same in highest - lowest <= near]


def outcomes_of(
    stage: OnlineStage, names: Sequence[str], rollout: GlobalRollout
) -> tuple[Tensor, GlobalRollout]:
    """Outcome (B,) of each reply, on every rank, and the rollout with what its rules gave: they are
    not asked twice. Services remember their answers; the reward model sees the replies that are
    kept a second time."""
    models, group = stage.models, stage.strategy.group
    components, failures = score_without_model(stage.job, models, group, rollout)
    rollout = replace(rollout, rule_scores=(components, failures))
    components = components | score_by_services(models, group, rollout).scores
    if "model" in names:
        micro, reward = stage.job.resources.micro_batch_size, models.reward
        assert reward is not None
        scores = score_all(reward, rollout.sequences, stage.strategy, micro)  # (B,)
        components = {"model": scores, **components}
    return weighted_sum({name: components[name] for name in names}, models.weights), rollout


def join(
    rollouts: Sequence[GlobalRollout], places: Sequence[tuple[int, int]], group_size: int
) -> GlobalRollout:
    """Some groups of several rollouts as one rollout.

    Args:
        places: rollout and number of each group.
    """
    chosen = [
        (number, reply)
        for number, group in places
        for reply in range(group * group_size, (group + 1) * group_size)
    ]

    def replies(columns: Sequence[Any]) -> list[Any]:
        return [columns[number][reply] for number, reply in chosen]

    first = rollouts[0]
    names = first.rule_scores[0] if first.rule_scores else {}
    failures: dict[str, int] = {}
    for rollout in rollouts:
        assert rollout.rule_scores is not None
        for why, count in rollout.rule_scores[1].items():
            failures[why] = failures.get(why, 0) + count
    components = {
        name: torch.stack(replies([r.rule_scores[0][name] for r in rollouts if r.rule_scores]))
        for name in names
    }
    return GlobalRollout(
        rows=replies([r.rows for r in rollouts]),
        sequences=replies([r.sequences for r in rollouts]),
        prompt_lengths=replies([r.prompt_lengths for r in rollouts]),
        logprobs=replies([r.logprobs for r in rollouts]),
        finished=torch.stack(replies([r.finished for r in rollouts])),
        began=first.began,
        seconds=sum(r.seconds for r in rollouts),
        trained=None if first.trained is None else replies([r.trained for r in rollouts]),
        outcomes=None if first.outcomes is None else replies([r.outcomes for r in rollouts]),
        rule_scores=(components, failures),
    )
