"""Prefect's process worker, whose flow runs start within a fraction of a second.

python -m flows.warm.worker start --pool POOL ...     as `prefect worker start`
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows.warm import client

with warnings.catch_warnings():  # the class takes the place of Prefect's in its registry
    warnings.simplefilter("ignore")

    class WarmWorker(ProcessWorker):
        """A process worker that asks a fork server for engines, see `flows.warm.server`."""

        type = "process"
        socket: Path

        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> Any:
            """See `ProcessWorker.run`. A command of the deployment's own is left as it is."""
            if not configuration._command_configured:
                command = [sys.executable, "-I", "-S", client.__file__, str(self.socket)]
                configuration.command = shlex.join(command)
                configuration._command_configured = True
            return await super().run(flow_run, configuration, task_status)


@contextlib.contextmanager
def fork_server() -> Iterator[Path]:
    """A fork server for this process; yields its socket. It outlives this process while flow runs
    that it has forked go on."""
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    with tempfile.TemporaryDirectory(prefix="rlhf-warm-") as folder:
        path = Path(folder) / "socket"
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.warm.server", str(path)],
            env={**os.environ, **settings}, stdin=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield path
        finally:
            assert server.stdin is not None
            server.stdin.close()


if __name__ == "__main__":
    from prefect.cli import app

    with fork_server() as WarmWorker.socket:
        sys.argv = ["prefect", "worker", *sys.argv[1:], "--type", "process"]
        app()
