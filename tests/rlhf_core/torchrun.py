"""Starts real ranks for tests."""

import os
import subprocess
import sys
from pathlib import Path

from rlhf_core.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(size: int, *arguments: str, module: bool = False, env=None, timeout: float = 400):
    """Run a script (or `-m module`) under torchrun; fails the test with the output if it fails."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
        "--nproc-per-node", str(size), "--master-addr", "127.0.0.1",
        "--master-port", str(free_ports(1)[0]), *(["-m"] if module else []), *arguments,
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
