"""What a step reports, and what follows from it: metrics, sample replies, the collapse's bounds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.models.saving import export
from rlhf_core.training.online.ahead import Ahead
from rlhf_core.training.online.collapse import Save, stop_if_collapsed, warn_of_openings
from rlhf_core.training.online.correction import correction_metrics
from rlhf_core.training.online.curriculum import level_metrics
from rlhf_core.training.online.experience import Experience, Targets
from rlhf_core.training.online.heldout import evaluate
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.online.summary import summarise
from rlhf_core.training.online.truncated import masked_metrics
from rlhf_core.training.policy import save_policy

SAMPLES = 4  # replies of each rollout that are kept for people to look at


def report_and_save(
    stage: OnlineStage, step: int, experience: Experience, update: Mapping[str, float]
) -> None:
    """Log a step's metrics and samples, stop a policy that has collapsed; evaluate the policy, keep
    it as the best one, save a checkpoint: each where it is due. Every rank calls.

    Args:
        step: from 0. update: the metrics of the step's updates.

    Raises:
        PolicyCollapse: the last rollouts are past a bound.
        Preempted: the job was told to stop; the state is saved.
    """
    job, context, rollout = stage.job, stage.context, experience.rollout
    metrics = summarise(job, experience) | correction_metrics(job, experience) | dict(update)
    metrics |= level_metrics(stage, rollout.rows, experience.raw_scores)
    metrics |= masked_metrics(job, experience.loss_mask)
    metrics["rollout_seconds"] = rollout.seconds
    metrics |= staleness(stage, experience)
    tokens = float(experience.response_mask.sum())
    metrics["tokens_per_second"] = tokens / (time.perf_counter() - rollout.began)
    metrics |= stage.selection.measure(step + 1, job.steps, partial(evaluate, stage))
    context.log_metrics(step + 1, job.steps, metrics)
    if context.main:
        context.log_samples(step + 1, some_samples(stage.models.tokenizer, experience))
    lines = context.read_metrics() if context.main else []
    warn_of_openings(job, lines, context.log)
    stop_if_collapsed(job, stage.checkpointer, partial(whole_policy, stage), lines)
    stage.selection.keep(step + 1, job.steps)
    stage.checkpointer.after_step(step + 1, job.steps)


def staleness(stage: OnlineStage, experience: Experience) -> dict[str, float]:
    """How old the weights were that sampled the tokens of a rollout (steps, mean and maximum), the
    share of replies that were carried over an update, and the seconds that samplers waited for
    weights in the whole stage so far; nothing where replies are not sampled ahead."""
    ages, engine = experience.rollout.staleness, stage.engine
    if ages is None or not isinstance(engine, Ahead):
        return {}
    mask = experience.response_mask  # (B,T)
    youngest = ages.masked_fill(~mask, torch.iinfo(ages.dtype).max).amin(dim=1)  # (B,)
    oldest = ages.masked_fill(~mask, -1).amax(dim=1)  # (B,)
    return {
        "staleness": float(ages[mask].double().mean()),
        "staleness_max": float(oldest.max()),
        "carried_replies": float((oldest > youngest).double().mean()),
        "samplers_idle_seconds": engine.idle_seconds,
    }


def whole_policy(stage: OnlineStage) -> Save:
    """What writes the policy with some checkpoint's weights into a folder. Every rank calls, once:
    the policy cannot be trained after it."""
    whole = stage.strategy.unsharded(stage.models.trained, {}, keep=stage.context.main)

    def save(weights: dict[str, Tensor], folder: Path) -> None:
        save_policy(export(whole, weights), folder, stage.inputs.source)

    return save


def flat_groups(scores: Tensor, group_size: int) -> float:
    """Share of the groups whose scores (B,) are all equal: nothing is learned from them."""
    groups = scores.view(-1, group_size)  # (G, group_size)
    return float((groups.amax(1) == groups.amin(1)).float().mean())


def some_samples(tokenizer: Any, experience: Experience) -> list[dict[str, Any]]:
    """The first replies of a rollout as text."""
    rollout, found = experience.rollout, []
    for row in range(min(SAMPLES, len(rollout.sequences))):
        ids, start = rollout.sequences[row], rollout.prompt_lengths[row]
        prompt, reply = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:])
        )
        score = round(float(experience.raw_scores[row]), 4)
        found.append({"prompt": prompt, "reply": reply, "score": score})
    return found


def inspect(
    experience: Experience, targets: Targets
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A rollout for a person: rows of token ids, and tensors with one row for each."""
    rollout = experience.rollout
    rows = [
        {"input_ids": sequence, "prompt_length": length}
        for sequence, length in zip(rollout.sequences, rollout.prompt_lengths, strict=True)
    ]
    whole = vars(experience) | vars(targets) | {"finished": rollout.finished}
    whole |= {f"reward_{name}": x for name, x in experience.components.items()}
    return rows, {name: value for name, value in whole.items() if isinstance(value, Tensor)}
