"""What vLLM's engine processes run before anything else: they end with the server, however it ends.

A process that Python spawns imports its parent's main module first, under another name. While vLLM
is started this module is named as that (`named_as_main`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from rlhf_core.system.processes import die_with_parent

if __name__ == "__mp_main__":
    die_with_parent()


@contextlib.contextmanager
def named_as_main() -> Iterator[None]:
    """Processes that are spawned meanwhile import this module, and not the program that runs."""
    main = sys.modules["__main__"]
    own, main.__spec__ = main.__spec__, find_spec(__name__)
    try:
        yield
    finally:
        main.__spec__ = own
