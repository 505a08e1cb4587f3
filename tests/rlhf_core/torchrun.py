"""Starts real ranks for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(size: int, module: str, *files: str, env=None, timeout: float = 400):
    """Run a module's `main(files)` on ranks under torchrun, as the launcher does; fails the test
    with the output if it fails."""
    command = [
        sys.executable, "-W", "ignore", "-m", "rlhf_core.runtime.torchrun", str(size), module,
        *files,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        **(env or {}),
    }
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
