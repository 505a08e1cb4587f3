"""vLLM's server (as in `vllm serve`) with one model, behind the same checks.

It runs in this process instead of the command `vllm`, which requires a package named vllm; the CPU
build has another name. vLLM starts the engine in a second process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core.chat.model import Sampling
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import ConfigError, RLHFError
from rlhf_core.serving.auth import App, AuthMiddleware, Receive, Scope, Send
from rlhf_core.serving.engine_output import EngineOutput
from rlhf_core.serving.engine_process import named_as_main
from rlhf_core.serving.listening import SHUTDOWN_SECONDS, listen, url_of

# No telemetry, no downloads.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_COLOR": "0",
}
# On a CPU, 4 GiB for the KV cache instead of most of the memory.
DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "4"}
# OpenAI's parameters that vLLM accepts and does nothing with, although they would change a reply.
IGNORED = {
    "access_programs", "audio", "background_options", "best_of", "context_management",
    "conversation", "function_call", "functions", "image", "moderation", "prediction",
    "prompt_cache_options", "verbosity", "web_search_options",
}  # fmt: skip


class VllmAuthMiddleware(AuthMiddleware):
    """The middleware as vLLM creates it, with the application as the only argument.

    Attributes:
        checks: name, key and tokenizer; set by `serve`.
        ready: called once the server answers.
    """

    checks: tuple[str, str | None, Any]
    ready: Callable[[], None]

    def __init__(self, app: App) -> None:
        super().__init__(app, *self.checks, refused=frozenset(IGNORED))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                type(self).ready()

        await super().__call__(scope, receive, forward if scope["type"] == "lifespan" else send)


def serve(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    key: str | None,
    trust: bool,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C or SIGTERM. See `engine.main`."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("VLLM_API_KEY", None)  # the middleware's counts
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server has its own
    with listen(host, port) as listener, EngineOutput() as output, named_as_main():
        address = url_of(listener, host)

        def ready() -> None:
            output.release()
            on_ready(address)

        VllmAuthMiddleware.checks = (name, key, load_tokenizer(folder, trust))
        VllmAuthMiddleware.ready = staticmethod(ready)
        try:
            import uvloop

            requested = uvloop.run(
                _serve(options(folder, name, host, port, trust), address, listener)
            )
        except (KeyboardInterrupt, asyncio.CancelledError):
            return
        except ImportError as error:
            raise ConfigError(
                f"vLLM's server lacks a package ({error}): install what requirements/vllm.txt "
                "pins, or use --engine transformers."
            ) from error
        except (ValueError, RuntimeError, OSError, NotImplementedError, AssertionError) as error:
            output.settle()
            reason = output.reason() or str(error).strip() or type(error).__name__
            raise ConfigError(
                f"vLLM cannot serve this model: {reason}. Use --engine transformers, or change "
                "what it names; with VLLM_LOGGING_LEVEL=INFO vLLM says more."
            ) from error
        if not requested:
            raise RLHFError("vLLM's engine has ended; its output is above. Start it again.")


def options(folder: Path, name: str, host: str, port: int, trust: bool) -> list[str]:
    """The options of `vllm serve`."""
    given = [
        str(folder), "--served-model-name", name, "--host", host, "--port", str(port),
        "--middleware", f"{__name__}.{VllmAuthMiddleware.__name__}",
        "--shutdown-timeout", str(SHUTDOWN_SECONDS),
        "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if default := sampling_by_default(folder):
        given += ["--override-generation-config", json.dumps(default)]
    return [*given, "--trust-remote-code"] if trust else given


def sampling_by_default(folder: Path) -> dict[str, Any]:
    """Sampling for requests without a temperature; see `sampling.defaults`."""
    with contextlib.suppress(FileNotFoundError):
        if json.loads((folder / "generation_config.json").read_text()).get("do_sample"):
            return {}
    given = Sampling().options()
    del given["do_sample"]
    return given


async def _serve(given: list[str], address: str, listener: socket.socket) -> bool:
    """Run the server; whether it ended because of a requested shutdown."""
    from vllm.entrypoints.launchers.api_server.entry import (
        build_and_serve,
        build_async_engine_client,
    )
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if current_platform.is_cpu():
        given = [*given, "--enforce-eager"]  # compiling needs a compiler and does not pay off
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    args.model = args.model_tag
    validate_parsed_serve_args(args)
    requested = False
    async with build_async_engine_client(args) as engine:
        shut_down = engine.shutdown

        def noting_shut_down(*arguments: Any, **named: Any) -> None:
            nonlocal requested
            requested = True
            # An engine that does not end in time is killed, a reply cut off: not worth a message.
            for name in ("vllm", "uvicorn.error"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            shut_down(*arguments, **named)

        engine.shutdown = noting_shut_down  # type: ignore[method-assign]
        ended = await build_and_serve(
            engine, address, listener, args, timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        found = requested
    with contextlib.suppress(asyncio.CancelledError):
        await ended
    sys.stdout.flush()
    return found
