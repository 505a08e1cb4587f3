"""What is asked over HTTP while stages run. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx

from rlhf_core.jobs import PipelineConfig
from rlhf_core.jobs.reward_services import SERVICES
from rlhf_core.judges.posting import client_for
from rlhf_core.pipeline import recipe

SECONDS = 5.0


def remarks_on_services(config: PipelineConfig) -> list[str]:
    """Rewards and judges where nothing answers now. They may be started before their stage."""
    named: dict[str, str] = {}  # URL -> the first setting that has it
    for name, url in _services(config):
        named.setdefault(url, name)
    with ThreadPoolExecutor(max(1, len(named))) as pool:
        problems = pool.map(_silence, named)
        return [
            f"{name}: nothing answers at {url} now ({problem}); start it before the stage that "
            "asks it, which fails without it"
            for (url, name), problem in zip(named.items(), problems, strict=True)
            if problem
        ]


def _services(config: PipelineConfig) -> Iterator[tuple[str, str]]:
    """Setting and URL of all that is asked."""
    for stage in config.stages:
        settings = recipe.section(config, stage)
        if isinstance(settings, recipe.Rewarded):
            for number, reward in enumerate(settings.rewards):
                if isinstance(reward, SERVICES):
                    yield f"{stage}.rewards.{number}", reward.url
    for name, judge in recipe.judges(config).items():
        yield name, judge.url


def _silence(url: str) -> str:
    """Why there is no answer at all; empty where one comes, whatever it says. No key is sent."""
    try:
        with client_for("", SECONDS, 1) as client, client.stream("GET", url):
            return ""
    except httpx.HTTPError as error:
        return type(error).__name__
