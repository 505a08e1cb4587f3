"""What the shell offers after TAB: presets, stages, runs.

Each TAB starts `rlhf` anew. Nothing here imports pydantic, Prefect or the store, which take a
second or more.
"""

from __future__ import annotations

import itertools
import re

from rlhf_core.pipeline.preset_files import preset_names, preset_text
from rlhf_core.system.home import rlhf_home

# In the order in which they run. A test compares them with the pipeline's own names.
STAGES = (
    "model", "data", "pretrain", "sft", "label", "reward", "ppo", "dpo", "simpo", "orpo", "kto",
    "grpo", "rloo", "reinforce_pp", "best_of_n", "online_dpo", "rejection_sampling", "distill",
    "evaluate", "lm_eval", "publish",
)  # fmt: skip


def complete_preset(incomplete: str) -> list[tuple[str, str]]:
    """Presets with their descriptions."""
    return [
        (name, preset_description(name)) for name in preset_names() if name.startswith(incomplete)
    ]


def preset_description(name: str) -> str:
    """The first sentence of a preset, which says what it is for."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), preset_text(name).splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<=[.])(?<!Dr\.)\s", text, maxsplit=1)[0]


def complete_stage(incomplete: str) -> list[str]:
    """Names of stages. A run with several rounds also has ppo-1, ppo-2 and so on."""
    return [name for name in STAGES if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Runs of this machine, newest first; reading the store would take too long."""
    try:
        found = sorted((path.name for path in (rlhf_home() / "runs").iterdir()), reverse=True)
    except OSError:  # no run yet
        found = []
    return [name for name in ("last", *found) if name.startswith(incomplete)]
