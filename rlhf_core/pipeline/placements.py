"""Where each stage of a configuration runs, and its longest sequences. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from rlhf_core.jobs import PipelineConfig, Resources, SampledPreferences, TrainSettings
from rlhf_core.pipeline import recipe
from rlhf_core.system.machine import Machine


def placements(config: PipelineConfig) -> dict[str, Resources]:
    """Setting name of each stage that runs on ranks -> its resources."""
    sections: dict[str, Any] = {}
    for step in recipe.steps(config):
        if step.algorithm == "label":
            name, labelling = recipe.label_settings(config, step)
            sections[name] = labelling
        elif step.algorithm != "best_of_n":  # it runs where the stage does that trains on it
            sections[step.algorithm] = recipe.section(config, step.algorithm)
    if recipe.produces_model(config):
        sections |= {name: getattr(config, name) for name in recipe.evaluation_stages(config)}
    return {
        name: getattr(settings, "resources", None) or config.resources
        for name, settings in sections.items()
    }


def samplers_of(config: PipelineConfig, name: str) -> int:
    """GPUs for what samples beside the ranks of a stage, by its name in `placements`."""
    section = recipe.section(config, name) if name in config.stages else None
    rollout = getattr(section, "rollout", None)
    return 0 if rollout is None else int(rollout.gpus)


def too_few_gpus(config: PipelineConfig, name: str, resources: Resources) -> str | None:
    """What is wrong if a cluster's launcher asks for fewer GPUs per node than a stage takes; with
    placeholders for the setting and the stages."""
    asked = getattr(config.launcher, "gpus_per_node", None)
    needed = resources.ranks + (beside := samplers_of(config, name))
    if not asked or resources.device == "cpu" or needed <= asked:
        return None
    of = f" and {beside} GPUs for samplers (rollout.ranks)" if beside else ""
    return (
        f"launcher.gpus_per_node is {asked}, but {{}}.ranks is {resources.ranks} (for {{}}){of}, "
        "and each takes a GPU; raise it, or lower the others"
    )


def trained_stages(
    config: PipelineConfig,
) -> Iterator[tuple[str, TrainSettings, Resources, int]]:
    """The stages that train: name, settings, resources, and the longest sequence in tokens."""
    preference, prompts = config.data.preference, config.data.prompts
    longest = prompts.longest_prompt
    pairs = (
        longest + preference.max_new_tokens
        if isinstance(preference, SampledPreferences)
        else preference.max_length
    )
    placed = placements(config)
    for stage in config.stages:
        settings = recipe.section(config, stage)
        lengths = {
            "pretrain": getattr(settings, "length", 0),
            "sft": config.data.sft.max_length,
            "preference": pairs,
        }
        if config.data.unpaired is not None:
            lengths["unpaired"] = config.data.unpaired.max_length
        lengths["prompts"] = longest + response_tokens(settings)
        lengths["best_of_n"] = lengths["prompts"]
        roles = recipe.roles(config, stage).values()
        yield (
            stage,
            settings,
            placed[stage],
            max(lengths[r] for r in roles if r in lengths),
        )


def response_tokens(settings: Any) -> int:
    """The most tokens that a stage lets follow a prompt: of a reply, or of an episode of several
    turns; 0 where it samples nothing."""
    found = getattr(settings, "response_tokens", getattr(settings, "max_new_tokens", None))
    return int(found or 0)


def reply_length(config: PipelineConfig) -> int:
    """Longest reply in the evaluation, in tokens: its setting, else the last sampling stage's."""
    own = [getattr(recipe.section(config, s), "max_new_tokens", None) for s in config.stages]
    found = [n for n in own if n is not None]
    return config.evaluate.max_new_tokens or (found[-1] if found else config.ppo.max_new_tokens)


def section_at(config: PipelineConfig, path: str) -> Any:
    section: Any = config
    for part in path.split("."):
        section = getattr(section, part)
    return section


def device_of(resources: Resources, machine: Machine) -> Literal["cpu", "cuda"]:
    """Where the ranks of a stage run."""
    use = resources.device == "cuda" or (resources.device == "auto" and machine.gpus > 0)
    return "cuda" if use else "cpu"
