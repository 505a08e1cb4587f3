"""Checks of the orders in which prompts and rows are taken."""

from __future__ import annotations

from rlhf_core.jobs import PipelineConfig
from rlhf_core.pipeline import recipe


def check_curricula(config: PipelineConfig) -> list[str]:
    """Curricula without the column that they need, and columns that order nothing."""
    return _curriculum_without_levels(config) + _curriculum_of_documents(config)


def _curriculum_without_levels(config: PipelineConfig) -> list[str]:
    if all(part.curriculum for part in config.data.prompts.parts):
        return []
    return [
        f"{stage}.curriculum is set, but data.prompts names no column with the prompts' levels; "
        "set data.prompts.curriculum to the name of one with a number, or clear it"
        for stage in config.stages
        if getattr(recipe.section(config, stage), "curriculum", None) is not None
    ]


def _curriculum_of_documents(config: PipelineConfig) -> list[str]:
    return [
        f"{name}.curriculum is {settings.curriculum}, but the stage pretrain packs documents end "
        "to end in one order; clear it"
        for _, name, settings in recipe.data_sources(config)
        if name.startswith("data.pretrain") and settings.curriculum
    ]
