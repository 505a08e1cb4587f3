"""Which server a model is served by: vLLM's, where it is installed, or transformers'."""

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
    tell: Callable[[str], None] = print,
) -> None:
    """Serve the model in a folder until Ctrl-C or SIGTERM.

    Args:
        name: what clients call the model.
        key: API key that clients have to send; None: nobody is asked.
        tell: gets the address once the server answers.

    Raises:
        ConfigError: the server is not installed or cannot start, or the port is taken.
        ModelError: the folder holds no chat model.
    """
    allow(trust_remote_code)
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") else "transformers"
    if engine == "vllm":
        is_trusted(folder)  # raises when its code would be needed and is not allowed
        if find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed here: docs/training.md says how; or use --engine "
                "transformers."
            )
        from rlhf_core.serving import vllm_server

        vllm_server.serve(
            folder, name=name, host=host, port=port, key=key, trust=trust_remote_code, tell=tell
        )
        return
    missing = [module for module in ("openai", "fastapi", "uvicorn") if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"transformers' server needs {', '.join(missing)}: pip install 'rlhf-pipeline[serve]'"
        )
    from rlhf_core.serving.hugging import serve

    serve(folder, name=name, host=host, port=port, key=key, tell=tell)
