"""Whether Python code that lies beside a model's weights may run.

It runs only where a person said so for that model: `model.trust_remote_code`, which every job of
the run carries, or `rlhf chat --trust-remote-code`. That an artifact holds code is no permission.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from pathlib import Path

from rlhf_core.errors import ModelError

_allowed: ContextVar[bool] = ContextVar("remote code is allowed", default=False)


def allow(yes: bool) -> None:
    """Set what holds for the models that are loaded from now on."""
    _allowed.set(yes)


def is_trusted(folder: Path) -> bool:
    """The `trust_remote_code` to load a model or tokenizer of this folder with.

    Raises:
        ModelError: the folder's code would be needed, and is not allowed.
    """
    if _allowed.get():
        return True
    for name in ("config.json", "tokenizer_config.json"):
        try:
            value = json.loads((Path(folder) / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # loading says what is wrong with it
        if isinstance(value, dict) and value.get("auto_map"):
            raise ModelError(
                f"{Path(folder) / name} asks for Python code of the model's own (auto_map), which "
                "is not allowed to run; read it, then set model.trust_remote_code to true, or "
                "start `rlhf chat` with --trust-remote-code"
            )
    return False
