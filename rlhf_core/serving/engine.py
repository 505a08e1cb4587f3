"""Which server a model is served by. vLLM takes this process over; transformers' runs in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rlhf_core.errors import ConfigError
from rlhf_core.remote_code import allow, is_trusted

Engine = Literal["auto", "transformers", "vllm"]


def main(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    key: str | None,
    engine: Engine = "auto",
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve the model in a folder until Ctrl-C or SIGTERM.

    Args:
        name: what clients call the model.
        key: API key that clients have to send; None: nobody is asked.
        tell: gets the address once the server answers (vLLM tells it itself).

    Raises:
        ConfigError: the server is not installed, or the port is taken.
        ModelError: the folder holds no chat model.
    """
    allow(trust_remote_code)
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") else "transformers"
    if engine == "vllm":
        is_trusted(folder)  # raises when its code would be needed and is not allowed
        command = vllm_command(folder, name, host, port, trust_remote_code)
        if not Path(command[0]).exists():
            raise ConfigError(
                f"There is no {command[0]}: install vLLM into this environment, or use --engine "
                "transformers."
            )
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if key:
            environment["VLLM_API_KEY"] = key
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    missing = [module for module in ("openai", "fastapi", "uvicorn") if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"transformers' server needs {', '.join(missing)}: pip install 'rlhf-pipeline[serve]'"
        )
    from rlhf_core.serving.hugging import serve

    serve(folder, name=name, host=host, port=port, key=key, tell=tell)


def vllm_command(folder: Path, name: str, host: str, port: int, trust: bool) -> list[str]:
    """vLLM's command line. The key goes in the environment, which other users cannot read."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(folder),
        "--served-model-name", name, "--host", host, "--port", str(port),
    ]  # fmt: skip
    return [*command, "--trust-remote-code"] if trust else command
