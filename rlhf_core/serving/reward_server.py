"""The server for one reward model: `reward_api` by uvicorn, in this process."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.model_files.remote_code import allow


def main(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    key: str | None,
    trust_remote_code: bool = False,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve the reward model in a folder until Ctrl-C or SIGTERM.

    Args:
        name: of the model, for people.
        key: that clients must send as `Authorization: Bearer KEY`; None: no key is needed.
        trust_remote_code: run Python code that lies in the folder.
        on_ready: called with the server's URL once it answers.

    Raises:
        ConfigError: the server is not installed, or the port is in use.
        ModelError: the folder holds no reward model.
    """
    allow(trust_remote_code)
    missing = [module for module in ("starlette", "uvicorn") if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the server needs {', '.join(missing)}: pip install 'rlhf-pipeline[serve]'"
        )
    from transformers.utils import logging as hf_logging

    from rlhf_core.serving.auth import AuthMiddleware
    from rlhf_core.serving.listening import listen
    from rlhf_core.serving.reward_api import PATHS, RewardApi, RewardScorer
    from rlhf_core.serving.transformers_server import run

    hf_logging.disable_progress_bar()
    with listen(host, port) as listener:
        api = RewardApi(name, RewardScorer(folder))
        app = AuthMiddleware(api.application(), name, key, paths=PATHS)
        run(app, listener, host, on_ready)
