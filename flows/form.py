"""The run form of the deployments `rlhf` and `retrain`: a preset, and a box for what differs.

What is written counts, also where it is the default: a form with a control for each setting sends
them all, and cannot tell what was chosen. That form is the deployment `rlhf-all-settings`.
"""

from __future__ import annotations

import re
from typing import Literal

from prefect import flow, runtime
from prefect.logging import get_run_logger

from flows.rlhf import Returned, Stage, ending, run_pipeline
from rlhf_core.errors import ConfigError, RLHFError
from rlhf_core.jobs import PipelineConfig, WorkPoolLauncher
from rlhf_core.jobs.base import Seed
from rlhf_core.pipeline.presets import build_noting, parse_settings
from tasks.events import Log, log_event

Preset = Literal[
    "none", "smoke", "demo", "dpo", "simpo", "orpo", "kto", "grpo", "rloo", "reinforce_pp",
    "online_dpo", "rejection_sampling", "distill", "iterative-dpo", "grpo-rules", "rlvr", "dapo",
    "gspo", "cispo", "dr-grpo", "calculator", "pretrain", "bloom-560m", "llama-7b",
]  # fmt: skip
"""The presets in deployments/presets."""

BOX = "the form's settings"


def _pipeline_name() -> str:
    given = runtime.flow_run.parameters
    return run_name(given.get("name") or "", given.get("settings") or "")


@flow(name="rlhf-pipeline", flow_run_name=_pipeline_name, persist_result=False)
def rlhf_form(
    preset: Preset = "none",
    name: str = "",
    seed: Seed | None = None,
    settings: str = "",
    until: Stage = "publish",
) -> Returned:
    """Runs data preparation, the training stages, evaluation and publishing.

    Results that are in the store are reused, whichever run made them.

    Args:
        preset: settings to start from; `rlhf presets` says what each is for.
        name: name of the run in lists, reports and the store. Empty: the run name above.
        seed: seed of all shuffles, splits, initialisations and samples. None: that of the settings.
        settings: what differs from the preset, as YAML, such as `ppo: {kl_coef: 0.1}`. What is
            written here wins. docs/settings.md lists all settings.
        until: last stage to run.
    """

    def body() -> Returned:
        config = form_config(preset, settings, _pipeline_name(), seed, get_run_logger())
        return run_pipeline(config, until)

    return ending(body)


def form_config(
    preset: str, settings: str, name: str, seed: int | None = None, log: Log | None = None
) -> PipelineConfig:
    """The settings that a form describes. Without a launcher among them, stages run on the GPU
    work pool.

    Args:
        settings: YAML.
        name: of the run.
        log: gets warnings.

    Raises:
        ConfigError: the settings are not YAML, or contradict the form's other fields.
        PreflightError: settings are unknown or out of range; all of them in one list.
    """
    written = parse_settings(settings, BOX)
    given = {"preset": preset if preset != "none" else None, "seed": seed}
    for field, value in given.items():
        if value is None:
            continue
        if field in written and written[field] != value:
            raise ConfigError(
                f"{field} is {value} in the form and {written[field]!r} in its settings; leave out "
                "one of them."
            )
        written[field] = value
    config, notes = build_noting({**written, "name": name})
    if log is not None:
        for note in notes:
            log_event(log, "warning", "", note)
    if "launcher" not in config.model_fields_set:
        config = config.model_copy(update={"launcher": WorkPoolLauncher()})
    return config


def run_name(typed: str, settings: str, otherwise: str = "") -> str:
    """The run's name: what is typed, else that in the settings, else the flow run's own, with
    characters that a file name may have."""
    try:
        written = parse_settings(settings, BOX).get("name")
    except RLHFError:  # the flow says what is wrong
        written = None
    written = str(written) if isinstance(written, str | int) else ""  # a list may be endless
    name = typed.strip() or written or otherwise or str(runtime.flow_run.name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "run"
