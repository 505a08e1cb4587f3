"""Serves a model with vLLM's server if it is installed, else with this project's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rlhf_core.errors import ConfigError
from rlhf_core.model_files.remote_code import allow, is_trusted

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
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve the model in a folder until Ctrl-C or SIGTERM.

    Args:
        name: of the model in the API.
        key: API key that clients must send; None: no key is needed.
        engine: auto: vLLM if it is installed, else transformers.
        trust_remote_code: run Python code that lies in the folder.
        on_ready: called with the server's URL once it answers.

    Raises:
        ConfigError: the server is not installed or cannot start, or the port is in use.
        ModelError: the folder holds no chat model.
    """
    allow(trust_remote_code)
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") else "transformers"
    if engine == "vllm":
        is_trusted(folder)  # raises if the folder needs its own code, which is not allowed
        if find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed: see docs/training.md, or use --engine transformers."
            )
        from rlhf_core.serving import vllm_server

        vllm_server.serve(
            folder,
            name=name,
            host=host,
            port=port,
            key=key,
            trust=trust_remote_code,
            on_ready=on_ready,
        )
        return
    missing = [module for module in ("starlette", "uvicorn") if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the server needs {', '.join(missing)}: pip install 'rlhf-pipeline[serve]'"
        )
    from rlhf_core.serving.transformers_server import serve

    serve(folder, name=name, host=host, port=port, key=key, on_ready=on_ready)
