"""The playground's server: loads Gradio, starts the page and waits for Ctrl-C or SIGTERM."""

from __future__ import annotations

import hmac
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_core.errors import ConfigError
from rlhf_core.playground.agreement import Agreement, Rate
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.guard import Guard
from rlhf_core.playground.pool import ModelPool, default_limit
from rlhf_core.playground.replies import ReplyGenerator
from rlhf_core.store import Store
from rlhf_core.system.local import allowed_hosts


def main(
    store: Store,
    catalogue: Callable[[], list[RunChoices]],
    *,
    host: str,
    port: int,
    password: str | None,
    accuracy: Callable[[Sequence[float]], Rate],
    memory_gb: float | None = None,
    trust_remote_code: bool = False,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        catalogue: reads the available runs and models from the store; called per browser.
        accuracy: see `Agreement`.
        password: visitors log in with it and any user name; None: no login.
        memory_gb: limit (10^9 bytes) of all models in memory; None: see `default_limit`.
        on_ready: called with the page's address once it can be opened.

    Raises:
        ConfigError: Gradio is not installed, or the port is taken.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError(
            f"The page needs Gradio ({error}): pip install 'rlhf-pipeline[playground]'"
        ) from error

    from rlhf_core.playground.layout import CSS, FONTS, build
    from rlhf_core.playground.page import Page

    limit = default_limit() if memory_gb is None else int(memory_gb * 1e9)
    generator = ReplyGenerator(store, ModelPool(limit), trust_remote_code)
    blocks = build(Page(generator, catalogue, Agreement(store, accuracy)))
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        blocks.queue(max_size=64).launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True,
            share=False, inbrowser=False, ssr_mode=False, mcp_server=False, run_history=False,
            enable_monitoring=False, show_error=True, footer_links=[],
            app_kwargs={"middleware": _middleware(host)},
            auth=password_check(password) if password is not None else None,
            theme=gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"]), css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be used ({error}); choose another with --port."
        ) from error
    on_ready(f"http://{host}:{port}")
    ended.wait()
    blocks.close(verbose=False)


def _middleware(host: str) -> list[Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = allowed_hosts(host)
    return [
        Middleware(Guard),
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
    ]


def password_check(password: str) -> Callable[[str, str], bool]:
    """Gradio's ``auth``: any name with this password. `Guard` slows down guessing."""
    expected = password.encode()
    return lambda name, given: hmac.compare_digest(given.encode(), expected)
