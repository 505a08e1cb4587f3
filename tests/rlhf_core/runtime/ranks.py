"""Ranks between which another run commits the result of their stage; started by test_agreement.

One rank asks before that, the other one afterwards. In each job's folder `store.txt` names the
store, `late` the rank that asks afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.runtime import rank
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact, Store, open_store

JOB = SFTJob(
    model="0" * 64, data="1" * 64,
    resources=Resources(device="cpu", ranks=2, collective_timeout=20),
)  # fmt: skip


def run(job: SFTJob, context: StageContext) -> Artifact | None:
    """The stage: its ranks meet."""
    from rlhf_core.runtime.distributed import Group

    Group(job.resources).barrier()
    (context.folder / f"ran-{context.rank}").touch()
    return context.store.list("model")[0] if context.main else None


def main(files: list[str]) -> int:
    SFTJob.module = __name__
    for file in files:
        one_job(Path(file).parent, Store.stage_result)
    return 0


def one_job(folder: Path, stage_result: Callable[[Store, str], Artifact | None]) -> None:
    store = open_store((folder / "store.txt").read_text())
    asked = folder / "asked"

    def watched(self: Store, key: str) -> Artifact | None:
        found = stage_result(self, key)
        asked.touch()
        return found

    Store.stage_result = watched  # type: ignore[method-assign]
    if os.environ["RANK"] == (folder / "late").read_text():
        end = time.monotonic() + 2  # the other rank asks first, unless it leaves that to this one
        while not asked.exists() and time.monotonic() < end:
            time.sleep(0.02)
        store.commit_stage(JOB.key(), store.list("model")[0])
    rank.run_job(JOB, store, folder)
    Store.stage_result = stage_result  # type: ignore[method-assign]
