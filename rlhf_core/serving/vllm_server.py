"""vLLM's own server (what `vllm serve` starts) with one model, behind the same API key check.

It runs in this process and not as the command `vllm`: that one asks for a package of the name vllm,
which the CPU build is not. The engine is a second process that vLLM starts.
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
from rlhf_core.errors import ConfigError, RLHFError
from rlhf_core.serving.auth import App, AuthMiddleware, Receive, Scope, Send
from rlhf_core.serving.engine_output import EngineOutput
from rlhf_core.serving.engine_process import named_as_main
from rlhf_core.serving.listening import LAST_REPLIES, listening, url_of

# Nobody is told about it and nothing is loaded from elsewhere; and on a CPU not most of the memory,
# but so many GiB, are taken for what the model remembers of running replies.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_COLOR": "0",
}
DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "4"}


class Gate(AuthMiddleware):
    """The authentication as vLLM asks for it: made from the application alone."""

    name_and_key: tuple[str, str | None]
    ready: Callable[[], None]

    def __init__(self, app: App) -> None:
        super().__init__(app, *self.name_and_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                type(self).ready()

        await super().__call__(scope, receive, told if scope["type"] == "lifespan" else send)


def serve(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    key: str | None,
    trust: bool,
    tell: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C or SIGTERM. See `engine.main`."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("VLLM_API_KEY", None)  # the middleware's counts
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server has its own
    with listening(host, port) as listener, EngineOutput() as output, named_as_main():
        address = url_of(listener, host)

        def ready() -> None:
            output.let_through()
            tell(address)

        Gate.name_and_key, Gate.ready = (name, key), staticmethod(ready)
        try:
            import uvloop

            asked = uvloop.run(_serve(options(folder, name, host, port, trust), address, listener))
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
        if not asked:
            raise RLHFError("vLLM's engine has ended; what it said stands above. Start it again.")


def options(folder: Path, name: str, host: str, port: int, trust: bool) -> list[str]:
    """The options of `vllm serve`."""
    given = [
        str(folder), "--served-model-name", name, "--host", host, "--port", str(port),
        "--middleware", f"{__name__}.{Gate.__name__}",
        "--shutdown-timeout", str(LAST_REPLIES),
        "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if default := sampling_by_default(folder):
        given += ["--override-generation-config", json.dumps(default)]
    return [*given, "--trust-remote-code"] if trust else given


def sampling_by_default(folder: Path) -> dict[str, Any]:
    """What counts where a request names no temperature: as in `hugging.sample_by_default`."""
    with contextlib.suppress(FileNotFoundError):
        if json.loads((folder / "generation_config.json").read_text()).get("do_sample"):
            return {}
    given = Sampling().options()
    del given["do_sample"]
    return given


async def _serve(given: list[str], address: str, listener: socket.socket) -> bool:
    """Whether it ended because it was asked to."""
    from vllm.entrypoints.launchers.api_server.entry import (
        build_and_serve,
        build_async_engine_client,
    )
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if current_platform.is_cpu():
        given = [*given, "--enforce-eager"]  # compiling needs a compiler, and longer than it saves
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    args.model = args.model_tag
    validate_parsed_serve_args(args)
    asked = False
    async with build_async_engine_client(args) as engine:
        shut_down = engine.shutdown

        def noted(*arguments: Any, **named: Any) -> None:
            nonlocal asked
            asked = True
            # An engine that does not end in time is killed, which is no trouble of anyone's.
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
            shut_down(*arguments, **named)

        engine.shutdown = noted  # type: ignore[method-assign]
        ended = await build_and_serve(
            engine, address, listener, args, timeout_graceful_shutdown=LAST_REPLIES
        )
        found = asked
    with contextlib.suppress(asyncio.CancelledError):
        await ended
    sys.stdout.flush()
    return found
