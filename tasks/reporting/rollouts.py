"""What online RL measures beside its curves: rewards, groups, older weights, services, turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.pipeline.recipe import display_name
from tasks.reporting.curves import of_rollout, read_metrics
from tasks.reporting.markdown import table
from tasks.run import Run

# Metric -> what it is, in the order of the table; a stage logs some of them.
SHOWN = {
    "finished": "replies that ended by themselves (share)",
    "masked_replies": "replies left out of the loss, because they were cut (share)",
    "flat_groups": "groups whose replies all score alike, which teach nothing (share)",
    "groups_replaced": "groups replaced by other prompts, because all outcomes were alike",
    "groups_still_flat": "groups still alike after all rounds of other prompts",
    "resample_rounds": "rounds of other prompts",
    "ties": "prompts whose two replies are equally good, which teach nothing (share)",
    "judge_by_position": "pairs that the judge decides otherwise in the other order",
    "judge_agreed": "pairs that the judge calls equal in both orders",
    "judge_half": "pairs that the judge decides in one order only",
    "judge_identical": "pairs of identical replies",
    "judge_unclear": "answers of the judge without a verdict",
    "judge_requests": "requests to the judge",
    "judge_tokens_per_pair": "tokens that the judge costs, a pair",
    "level": "level of the curriculum",
    "level_pass_rate": "replies that pass at that level (share)",
    "clip_fraction": "tokens whose gradient the clip stops (share)",
    "turns": "turns of an episode",
    "environment_tokens": "tokens of an episode that the environment wrote",
    "environment_tool_calls": "tool calls of an episode",
    "environment_tool_errors": "tool calls of an episode that failed",
    "environment_rewritten_replies": "replies of an episode that the template writes otherwise",
    "environment_special_tokens_removed": "special tokens taken out of an episode's observations",
    "staleness": "age of the weights that sampled a token (steps)",
    "staleness_max": "age of the oldest weights (steps)",
    "carried_replies": "replies from more than one version of the weights (share)",
    "rollout_logprob_gap": "difference of sampler and trainer (nats per token)",
    "rollout_weight_mean": "correction weights: mean, 1 where both agree",
    "rollout_weight_max": "correction weights: largest, before the bound",
    "rollout_weight_outside": "correction weights beyond their bounds (share)",
    "rollout_weight_ess": "effective sample size of the corrected rollout (share)",
}


def rollouts(run: Run) -> list[str]:
    """A table for each stage of online RL: its metrics in the mean, in the first and in the last
    rollout. All of them are in its metrics.jsonl, by the names of docs/training.md."""
    found = []
    for stage, result in run.stages.items():
        lines = [line for line in read_metrics(run.store, result.digest) if of_rollout(line)]
        if lines:
            heads = [f"{display_name(stage)}: {len(lines)} rollouts", "mean", "first", "last"]
            found.append(table([heads, *(_row(label, v) for label, v in _measured(lines))]))
            found += _times(result.work.get("throughput", {}))
    return found


def _times(medians: Mapping[str, float]) -> list[str]:
    """How long rollouts took; the artifact's metrics have no times."""
    if "rollout_seconds" not in medians:
        return []
    text = f"In the median a rollout took {medians['rollout_seconds']:.3g} s"
    if "services_seconds" in medians:
        text += f", and services were waited for {medians['services_seconds']:.3g} s after it"
    return [f"{text}."]


def _measured(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """Label and values of each metric that is shown."""
    names = dict.fromkeys(name for line in lines for name in line)
    rewards = {name: _reward(name) for name in names if name.startswith("reward_")}
    failures = {
        name: f"replies that got 0, a rollout: {name.removeprefix('failure_').replace('_', ' ')}"
        for name in names if name.startswith("failure_")
    }  # fmt: skip
    counted = {
        name: f"{name.removeprefix('environment_').replace('_', ' ')}, counted by the environment, "
        "an episode"
        for name in names if name.startswith("environment_") and name not in SHOWN
    }  # fmt: skip
    for name, label in (rewards | failures | SHOWN | counted).items():
        values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        if values:
            yield label, values


def _reward(name: str) -> str:
    """reward_TYPE is the mean of one of the rewards, reward_TYPE/PART of a component of it."""
    kind, _, part = name.removeprefix("reward_").partition("/")
    if name == "reward_model_std":
        return "disagreement of the reward models (standard deviation)"
    if part == "tokens" and kind.startswith("judge"):
        return f"tokens that the reward {kind} costs, a reply"
    return f"reward {kind}: {part}" if part else f"reward {kind}"


def _row(label: str, values: Sequence[float]) -> list[str]:
    return [label, *(_number(x) for x in (sum(values) / len(values), values[0], values[-1]))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
