"""The pretended GPU's results, computed once in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import ROOT
from tests.gpu import stub

REQUIRED = "RLHF_REQUIRE_GPU_TESTS"
"""Set where these tests must not be skipped, as in CI."""


@pytest.fixture(scope="session")
def compute() -> Callable[..., str]:
    """Runs `python -m MODULE ARGUMENTS` with the stub at hand; returns what it printed."""
    try:
        stub.build()
    except stub.NoCompiler as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error}; {REQUIRED} is set", pytrace=False)
        pytest.skip(str(error))

    def run(module: str, *arguments: str | Path) -> str:
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, f"{module} ended with {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    return run
