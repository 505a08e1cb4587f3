"""The command `rlhf` with rlhf_stub in the place of the ranks' code."""

import os
from pathlib import Path

from flows import server
from flows.cli import main as cli

STUBS = Path(__file__).parents[1] / "tasks/stubs"


class Server(server.TemporaryServer):
    def __init__(self):
        super().__init__()
        put_stub()


def choose():
    found = choose_server()
    if found.url is not None:
        put_stub()
    return found


def put_stub():
    """Not before a server is chosen: `tasks` imports Prefect, which reads the environment."""
    import tasks.launchers.local

    tasks.launchers.local.MODULE = "rlhf_stub.__main__"


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STUBS), os.environ.get("PYTHONPATH", "")])
    choose_server, server.choose_server = server.choose_server, choose
    server.TemporaryServer = Server
    if os.environ.get("STUB_PLAIN"):
        from rlhf_core.jobs import BaseJob

        BaseJob.torchrun = False
    cli.main()
