"""What the fork servers of the tests import before they fork ranks."""

import importlib

from rlhf_core.runtime.rank import MODEL_MODULES, STRATEGY_MODULES
from rlhf_core.system.processes import name_process

MODULES = ("rlhf_core.runtime.torchrun", *MODEL_MODULES, *STRATEGY_MODULES)


def preload(files: list[str]) -> None:
    """See `rlhf_core.runtime.fork_server`."""
    name_process("tests' server")  # not one of those that the tests look for
    for module in MODULES:
        importlib.import_module(module)
