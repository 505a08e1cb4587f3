"""Starts real ranks for tests."""

from __future__ import annotations

import os
import subprocess
import threading

from tests import forked
from tests.forked import ROOT

HANGS = 1500.0  # seconds; a busy machine may need several minutes


def run_ranks(
    size: int, module: str, *files: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module's `main(files)` on ranks under torchrun's agent, as the launcher does.

    Output and errors are both in `stdout`. Fails the test with the output if a rank fails.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        **(env or {}),
    }
    stage = forked.server(forked.MODELS, env).fork(size, module, files, environment)
    assert stage is not None, "the fork server has ended"
    watch = threading.Timer(HANGS, stage.kill)
    watch.start()
    try:
        said = stage.stdout.read().decode("utf-8", "replace")
        code = stage.wait()
    finally:
        watch.cancel()
        stage.kill()
        stage.stdout.close()
    assert code == 0, f"exit code {code}\n{said[-6000:]}"
    return subprocess.CompletedProcess([module, *files], code, said)
