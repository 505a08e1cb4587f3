"""Decides whether Python code beside a model's weights may run.

It runs only if a person allowed it for that model: with `model.trust_remote_code`, which every job
of the run carries, or `rlhf chat --trust-remote-code`. Code in an artifact is no permission.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from pathlib import Path

from rlhf_core.errors import ModelError

_allowed: ContextVar[bool] = ContextVar("remote code is allowed", default=False)


def allow(yes: bool) -> None:
    """Set the permission for the models that this context (thread) loads from now on."""
    _allowed.set(yes)


def is_trusted(folder: Path) -> bool:
    """The value of `trust_remote_code` for loading a model or tokenizer of this folder.

    Raises:
        ModelError: the folder needs its own code, which is not allowed.
    """
    if _allowed.get():
        return True
    for name in ("config.json", "tokenizer_config.json"):
        try:
            value = json.loads((Path(folder) / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # loading reports the problem
        if isinstance(value, dict) and value.get("auto_map"):
            raise ModelError(
                f"{Path(folder) / name} requires Python code of the model (auto_map), which is not "
                "allowed to run; read it, then set model.trust_remote_code to true, or start "
                "`rlhf chat` with --trust-remote-code"
            )
    return False
