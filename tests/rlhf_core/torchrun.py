"""Starts real ranks for tests."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from pathlib import Path

from tasks.launchers.fork_client import ForkServer

ROOT = Path(__file__).resolve().parents[2]
HANGS = 1500.0  # seconds; a busy machine may need several minutes
_server: ForkServer | None = None


def run_ranks(
    size: int, module: str, *files: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module's `main(files)` on ranks under torchrun's agent, as the launcher does.

    All ranks of a test process come from one fork server, which imports torch and transformers
    once. Output and errors are both in `stdout`. Fails the test with the output if a rank fails.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        **(env or {}),
    }
    global _server
    if _server is None:
        _server = ForkServer(environment)
        _server.preload("tests.rlhf_core.preloaded")
        atexit.register(_server.close)
    stage = _server.fork(size, module, files, environment)
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
    return subprocess.CompletedProcess([sys.executable, module, *files], code, said)
