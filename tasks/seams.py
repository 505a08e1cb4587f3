"""Functions of rlhf_core that the orchestrator calls itself; all of them are free of torch."""

from __future__ import annotations

import importlib
from typing import Any

from rlhf_core.jobs import DataSettings, ModelSettings, PipelineConfig


def _call(module: str, function: str, missing: Any, *arguments: Any) -> Any:
    try:
        return getattr(importlib.import_module(module), function)(*arguments)
    except (ModuleNotFoundError, AttributeError) as error:
        if module in str(error):
            return missing  # not written yet
        raise


def preflight(config: PipelineConfig) -> list[str]:
    """Problems found before anything starts, one text each."""
    return list(_call("rlhf_core.preflight", "check", [], config))


def data_fingerprint(settings: DataSettings) -> str:
    """Identity of a data set's contents."""
    return str(_call("rlhf_core.data.fingerprint", "fingerprint", "", settings))


def model_fingerprint(settings: ModelSettings) -> str:
    """Identity of a model source's contents."""
    return str(_call("rlhf_core.weights", "fingerprint", "", settings.source, settings.revision))
