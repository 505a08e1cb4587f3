"""One rank of one or more jobs: `torchrun ... -m rlhf_core FOLDER/job.json [FOLDER/job.json ...]`.

Several jobs run one after another in the same process, so that modules are imported once.
Exit code 0: every job's artifact is in the store. 1: error-<rank>.json says why not.
"""

from __future__ import annotations

import os
import sys

from rlhf_core.runtime.rank import main, preload
from rlhf_core.system.cpus import limit_threads

__all__ = ["main", "preload"]  # torchrun's agent and the fork server use both

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        sys.exit(2)
    limit_threads()  # a launcher has given each rank its share
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # Collective threads of a broken process group can block a normal interpreter exit.
    os._exit(code)
