"""Makes vLLM's engine processes end with the server, however it ends.

A process that Python spawns first imports its parent's main module, under the name `__mp_main__`.
While vLLM starts, `named_as_main` makes it import this module instead.
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
    """Processes that are spawned in the block import this module instead of the main module."""
    main = sys.modules["__main__"]
    own, main.__spec__ = main.__spec__, find_spec(__name__)
    try:
        yield
    finally:
        main.__spec__ = own
