"""Makes vLLM's engine processes end with the server, however it ends, and by nothing else.

Ctrl-C in a terminal goes to all processes. An engine that takes it at once fails on what the server
still asks of it, and says so with a traceback.

A process that Python spawns first imports its parent's main module, under the name `__mp_main__`.
While vLLM starts, `named_as_main` makes it import this module instead.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from rlhf_core.system.processes import die_with_parent

if __name__ == "__mp_main__":
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def named_as_main() -> Iterator[None]:
    """Processes that are spawned in the block import this module instead of the main module."""
    main = sys.modules["__main__"]
    own, main.__spec__ = main.__spec__, find_spec(__name__)
    try:
        yield
    finally:
        main.__spec__ = own
