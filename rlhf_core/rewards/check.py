"""Checks the rewards of a configuration before a run starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import DataSettings, Source
from rlhf_core.jobs.reward_services import SERVICES, CodeReward, JudgeReward
from rlhf_core.jobs.rewards import (
    AnswerReward,
    PythonReward,
    ReasoningGymReward,
    Reward,
    SentimentReward,
)
from rlhf_core.judges.posting import key_from
from rlhf_core.rewards.reasoning import INSTALL, is_installed
from rlhf_core.system.processes import python_path

IMPORT_SECONDS = 120.0

_IMPORT = """
import sys
from rlhf_core.errors import ConfigError
from rlhf_core.rewards.function import load_function
try:
    load_function(sys.argv[1])
except ConfigError as error:
    sys.exit(f"PROBLEM {error}")
"""


def check_rewards(rewards: Sequence[Reward], prompts: Source | None = None) -> list[str]:
    """Problems of a configuration's rewards, one text each.

    The checks of pydantic (an invalid pattern, an empty list of words) are not repeated. The user's
    functions are imported in another process, so that they do not affect this one.

    Args:
        prompts: settings of the prompts; if given, check that they have the answers that the rules
            need.
    """
    problems = []
    if not rewards:
        problems.append(
            "rewards is empty, so every reply would get the same score; give at least one, such as "
            "{type: model}"
        )
    elif not any(reward.weight for reward in rewards):
        problems.append("every reward has the weight 0; expected at least one other weight")
    for number, reward in enumerate(rewards):
        where = f"rewards.{number} ({reward.type})"
        match reward:
            case PythonReward():
                if problem := _importable(reward.function):
                    problems.append(f"{where}: {problem}")
            case ReasoningGymReward() if not is_installed():
                problems.append(f"{where}: the package reasoning-gym is not installed; {INSTALL}")
            case SentimentReward() if find_spec("vaderSentiment") is None:
                problems.append(
                    f"{where}: the package vaderSentiment is not installed; run: pip install "
                    "vaderSentiment"
                )
        if isinstance(reward, SERVICES):
            try:
                key_from(reward.key_variable, f"The reward {reward.type}")
            except ConfigError as error:
                problems.append(f"{where}: {error}")
        missing = {_answers(reward, part): None for part in (prompts.parts if prompts else ())}
        problems += [f"{where}: {problem}" for problem in missing if problem]
    return problems


def _answers(reward: Reward, prompts: DataSettings) -> str:
    """Why the prompts lack the answers that a rule needs; empty if they have them."""
    from rlhf_core.data.dataset.carried import carried
    from rlhf_core.data.sources.reasoning import is_reasoning

    columns = carried(prompts, "prompts")
    match reward:
        case AnswerReward(without_answer=None) if "answer" not in columns:
            return (
                f"the prompts ({prompts.source}) have no answers; name the column that has them "
                "with data.prompts.columns: {answer: <its name>}"
            )
        case ReasoningGymReward(without_answer=None):
            if not is_reasoning(prompts.source) and "extra" not in columns:
                return (
                    f"the prompts ({prompts.source}) are not from reasoning-gym; set "
                    "data.prompts.source to reasoning-gym:TASK"
                )
        case CodeReward(column=column) if column not in columns:
            return (
                f"the prompts ({prompts.source}) have no tests; name the column that has them with "
                f"data.prompts.columns: {{{column}: <its name>}}"
            )
        case JudgeReward(template=template) if "{answer}" in template and "answer" not in columns:
            return (
                f"its template has {{answer}}, and the prompts ({prompts.source}) have no answers; "
                "name the column that has them with data.prompts.columns: {answer: <its name>}"
            )
    return ""


def _importable(path: str) -> str:
    """Why a user's function cannot be imported; empty if it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, path],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IMPORT_SECONDS,
            check=False, env={**os.environ, "PYTHONPATH": python_path()},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"importing {path} takes more than {IMPORT_SECONDS:g} s; make its import faster"
    if done.returncode == 0:
        return ""
    output = done.stderr.strip()
    _, marked, problem = output.rpartition("PROBLEM ")
    return problem if marked else f"importing {path} ended with {output[-300:]!r}"
