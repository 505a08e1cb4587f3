"""Which judges of an evaluation are independent of what the model was trained on.

A judge that had a part in the training says only whether the training did what it was asked for.
Known from the configuration: who labelled the pairs, what the rewards are, and the names of models,
by which their family is told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_core.jobs import PipelineConfig, SampledPreferences
from rlhf_core.jobs.reward_services import HttpReward, JudgeReward
from rlhf_core.jobs.rewards import (
    VERIFIERS,
    ModelReward,
    Reward,
    SentimentReward,
)
from rlhf_core.pipeline import recipe

FAMILIES = {
    "gpt": r"gpt|chatgpt|o[1-9]", "claude": r"claude", "gemini": r"gemini", "gemma": r"gemma",
    "llama": r"llama|vicuna|alpaca|tulu|hermes", "mistral": r"mistral|mixtral|ministral|zephyr",
    "qwen": r"qwen|qwq|qvq", "deepseek": r"deepseek", "glm": r"glm|chatglm", "phi": r"phi",
    "smollm": r"smollm", "yi": r"yi", "olmo": r"olmo", "falcon": r"falcon", "bloom": r"bloom",
    "pythia": r"pythia", "opt": r"opt", "command": r"command|aya", "granite": r"granite",
    "internlm": r"internlm", "baichuan": r"baichuan", "kimi": r"kimi", "grok": r"grok",
    "nemotron": r"nemotron", "minicpm": r"minicpm",
}  # fmt: skip
"""Model family -> how its models are called."""


@dataclass(frozen=True)
class Judge:
    """A judge of the evaluation.

    Attributes:
        name: for people.
        why: the judge is independent, or is not; a sentence without its subject.
    """

    name: str
    independent: bool
    why: str


def judges_of(config: PipelineConfig) -> dict[str, Judge]:
    """Key of each judge's numbers in evaluation.json -> the judge."""
    settings = config.evaluate
    found = {}
    rewards = recipe.online_rewards(config)
    if any(not isinstance(reward, ModelReward) for reward in rewards):
        name = f"the reward ({', '.join(reward.type for reward in rewards)})"
        found["reward"] = Judge(name, False, "is what the model was trained on")
    elif recipe.has_reward_model(config):
        found["reward"] = _reward_model(config)
    if any(isinstance(reward, VERIFIERS) for reward in rewards):
        found["answers"] = Judge(
            "the verifier", True, "compares replies with the answers of held-out prompts"
        )
    if settings.judge != "none":
        found["gold"] = _lexicon(config, settings.judge)
    if settings.judge_endpoint is not None:
        found["judge"] = _endpoint(config, settings.judge_endpoint.model)
    return found


def families(name: str) -> set[str]:
    """The families that a model's name tells: two of a distilled one, none of an unknown one."""
    last = name.lower().rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return {
        family
        for family, pattern in FAMILIES.items()
        if re.search(rf"(?:^|[^a-z]|chat|tiny|code|open)(?:{pattern})(?![a-z])", last)
    }


def _reward_model(config: PipelineConfig) -> Judge:
    labelled = any(s == "reward_model" for s in _labellers(config))
    uses = [recipe.roles(config, step.algorithm).values() for step in recipe.steps(config)
            if step.algorithm != "label"]  # fmt: skip
    name = "the reward model"
    if "reward" in config.stages:
        return Judge(name, False, "was trained in this run, on the preferences that it follows")
    if labelled or any("reward_model" in roles for roles in uses):
        return Judge(name, False, "is what the model was trained on")
    imported: set[str] = set().union(*map(families, recipe.imported_rewards(config)))
    shared = imported & families(config.model.source)
    if shared:
        return Judge(name, False, f"is of the policy's family ({', '.join(sorted(shared))})")
    return Judge(name, True, "had no part in the training")


def _lexicon(config: PipelineConfig, judge: str) -> Judge:
    name = f"the gold judge {judge}"
    if judge in _labellers(config):
        return Judge(name, False, "also labelled the pairs that the run trains on")
    used = any(isinstance(r, SentimentReward) and r.weight for r in _rewards(config))
    if judge == "vader" and used:
        return Judge(name, False, "is the reward 'sentiment', on which the model was trained")
    return Judge(name, True, _no_part(config))


def _endpoint(config: PipelineConfig, model: str) -> Judge:
    name = f"the judge {model}"
    if model in _labelling_judges(config):
        return Judge(name, False, "also labelled the pairs that the run trains on")
    rated = [r.model for r in _rewards(config) if isinstance(r, JudgeReward) and r.weight]
    if model in rated:
        return Judge(name, False, "is the reward 'judge', on which the model was trained")
    others = [("labeller", other) for other in _labelling_judges(config)]
    others += [("reward 'judge'", other) for other in rated]
    others += [("policy", config.model.source if config.new_model is None else "")]
    others += [("reward model", source) for source in recipe.imported_rewards(config)]
    for who, other in others:
        if shared := families(model) & families(other):
            family = ", ".join(sorted(shared))
            return Judge(
                name, False, f"is of the {who}'s family ({family}), and may share its bias"
            )
    return Judge(name, True, _no_part(config))


def _labellers(config: PipelineConfig) -> list[str]:
    labels = [step for step in recipe.steps(config) if step.algorithm == "label"]
    return [recipe.label_settings(config, step)[1].labeller for step in labels]


def _labelling_judges(config: PipelineConfig) -> list[str]:
    """Models behind endpoints that label pairs, before training or in it."""
    return [judge.model for judge in recipe.labelling_judges(config).values()]


def _rewards(config: PipelineConfig) -> list[Reward]:
    """The rewards of all stages that have some."""
    found = [recipe.section(config, stage) for stage in config.stages]
    return [
        r for settings in found if isinstance(settings, recipe.Rewarded) for r in settings.rewards
    ]


def _no_part(config: PipelineConfig) -> str:
    urls = [r.url for r in _rewards(config) if isinstance(r, HttpReward) and r.weight]
    if urls:
        return f"had no part in the training, unless it is behind {', '.join(dict.fromkeys(urls))}"
    read = {role for step in recipe.steps(config)
            for role in recipe.roles(config, step.algorithm).values()}  # fmt: skip
    labelled = config.data.preference
    if "preference" in read and not isinstance(labelled, SampledPreferences):
        sources = ", ".join(part.source for part in labelled.parts)
        return f"had no part in the training, unless it labelled {sources}"
    return "had no part in the training"
