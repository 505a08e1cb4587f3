"""Runs the page until Ctrl-C or SIGTERM."""

from __future__ import annotations

import hmac
import signal
import threading
import time
from collections.abc import Callable

from rlhf_core.errors import ConfigError
from rlhf_core.playground.asking import Asker
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.pool import ModelPool, default_limit
from rlhf_core.store import Store

WRONG_PASSWORD_SECONDS = 1.0  # that a wrong password costs whoever tries many


def main(
    store: Store,
    catalogue: Callable[[], list[RunChoices]],
    *,
    host: str,
    port: int,
    password: str | None,
    memory_gb: float | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve the page.

    Args:
        catalogue: what can be chosen, read from the store anew.
        password: asked of everyone who comes, with a name of their own; None: nobody is asked.
        memory_gb: limit (10^9 bytes) of all models in memory; None: see `default_limit`.
        tell: gets the address once the page is there.

    Raises:
        ConfigError: Gradio is not installed, or the port is taken.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError(
            f"The page needs Gradio ({error}): pip install 'rlhf-pipeline[playground]'"
        ) from error
    from rlhf_core.playground.page import CSS, FONTS, Page, build

    limit = default_limit() if memory_gb is None else int(memory_gb * 1e9)
    page = Page(Asker(store, ModelPool(limit), trust_remote_code), catalogue)
    blocks = build(page)
    lock = threading.Lock()

    def allowed(name: str, given: str) -> bool:
        assert password is not None
        with lock:  # one at a time
            if hmac.compare_digest(given.encode(), password.encode()):
                return True
            time.sleep(WRONG_PASSWORD_SECONDS)
            return False

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        blocks.queue(max_size=64).launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True,
            share=False, inbrowser=False, ssr_mode=False, mcp_server=False, run_history=False,
            enable_monitoring=False, show_error=True, footer_links=[],
            auth=allowed if password is not None else None,
            theme=gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"]), css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be used ({error}); choose another with --port."
        ) from error
    tell(f"http://{host}:{port}")
    ended.wait()
    blocks.close(verbose=False)
