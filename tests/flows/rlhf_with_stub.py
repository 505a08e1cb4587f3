"""The command `rlhf` with rlhf_stub in the place of the ranks' code."""

import os

from tests.tasks.conftest import STUBS

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STUBS), os.environ.get("PYTHONPATH", "")])
    import tasks.launchers.local

    tasks.launchers.local.MODULE = "rlhf_stub.__main__"
    if os.environ.get("STUB_PLAIN"):
        from rlhf_core.jobs import BaseJob

        BaseJob.torchrun = False
    from flows.cli import main

    main()
