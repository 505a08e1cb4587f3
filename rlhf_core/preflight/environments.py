"""Checks the environments of online stages. Does not import torch."""

from __future__ import annotations

import os
import subprocess
import sys

from rlhf_core.data.dataset.carried import carried
from rlhf_core.jobs import OnlineSettings, PipelineConfig
from rlhf_core.jobs.environments import CalculatorEnvironment
from rlhf_core.pipeline import recipe
from rlhf_core.system.processes import python_path

SECONDS = 120.0

_MAKE = """
import sys
from pydantic import TypeAdapter
from rlhf_core.environments.make import make_environments
from rlhf_core.errors import RLHFError
from rlhf_core.jobs.environments import Environment
settings = TypeAdapter(Environment).validate_json(sys.argv[1])
servers = [x.model_copy(update={"retries": 0}) for x in getattr(settings, "servers", ())]
try:
    make_environments(settings.model_copy(update={"servers": tuple(servers)} if servers else {}))
except RLHFError as error:
    sys.exit(f"PROBLEM {error}")
"""


def check_environments(config: PipelineConfig) -> list[str]:
    """Problems of the environments, where stages run on this machine: code that cannot be imported,
    servers that do not answer, prompts without what a reward needs.

    People's code runs in another process, so that it does not affect this one.
    """
    problems = []
    for stage in config.stages:
        settings = recipe.section(config, stage)
        if not isinstance(settings, OnlineSettings) or settings.environment is None:
            continue
        environment = settings.environment
        rewarded = any(reward.type == "environment" for reward in settings.rewards)
        if isinstance(environment, CalculatorEnvironment):
            for part in config.data.prompts.parts if rewarded else ():
                if "answer" not in carried(part, "prompts"):
                    problems.append(
                        f"{stage}.environment: the calculator's reward needs answers, and the "
                        f"prompts ({part.source}) have none; name the column that has them with "
                        "data.prompts.columns: {answer: <its name>}"
                    )
        elif problem := _made(environment.model_dump_json()):
            problems.append(f"{stage}.environment: {problem}")
    return list(dict.fromkeys(problems))


def _made(settings: str) -> str:
    """Why an environment cannot be made; empty if it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _MAKE, settings],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False,
            env={**os.environ, "PYTHONPATH": python_path()},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"making it takes more than {SECONDS:g} s; make its import faster"
    if done.returncode == 0:
        return ""
    _, marked, problem = done.stderr.strip().rpartition("PROBLEM ")
    return problem if marked else f"making it ended with {done.stderr.strip()[-300:]!r}"
