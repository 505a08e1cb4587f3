"""What one rank does with its job files: run each job, or say why it failed.

An exception becomes a category (`rlhf_core.errors`) in `error-<rank>.json`, from which the
orchestrator decides whether to try again.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.errors import RLHFError
from rlhf_core.jobs import Job
from rlhf_core.model_files.remote_code import allow
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.job_file import read_job
from rlhf_core.runtime.stopping import stop, write_error
from rlhf_core.store import Store, open_store
from rlhf_core.system.host_memory import amount, peak_memory
from rlhf_core.system.processes import die_with_parent, name_process
from rlhf_core.system.secrets import hide


def run_job(job: Job, store: Store, folder: Path) -> None:
    """Run one job on this rank; reuse the artifact when the store already holds it."""
    context = StageContext.from_environment(store, job, folder)
    artifact = store.stage_result(context.key)
    if artifact is None:
        allow(job.trust_remote_code)
        module = importlib.import_module(job.module)
        with context.closing:
            artifact = module.run(job, context)
    if context.main:
        assert artifact is not None, f"{job.module}.run returned no artifact on rank 0"
        result = {"artifact": artifact.digest, "kind": artifact.kind, "key": context.key}
        partial = folder / "result.json.part"
        partial.write_text(json.dumps(result))
        partial.replace(folder / "result.json")


# CUDA's and NCCL's words; torch's allocator on the host; the C library's; C++'s; cuBLAS's.
MEMORY = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|bad_alloc|ALLOC_FAILED",
    re.IGNORECASE,
)


# gloo's and NCCL's words for a collective operation that another rank did not join in time.
WAITED = re.compile(r"timed out waiting|collective operation timeout|wait timeout", re.IGNORECASE)


def classify(error: BaseException) -> str:
    """Category of an error (see rlhf_core.errors)."""
    if isinstance(error, RLHFError):
        return error.category
    if any(is_memory(e) for e in reasons(error)):
        return "oom"
    return "hang" if WAITED.search(str(error)) else "internal"


def reasons(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from: a library may hide a lack of memory in its own."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_memory(error: BaseException) -> bool:
    """Whether an allocator found nothing more to give."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return MEMORY.search(str(error)) is not None


def describe(error: BaseException, category: str, rank: str, job: Job | None) -> str:
    """What the error file says."""
    text = str(error) or type(error).__name__
    if isinstance(error, RLHFError):
        return text
    if category == "oom":
        peak = ", ".join(f"{amount(size)} {where}" for where, size in peak_memory().items())
        first = text.splitlines()[0]
        return f"rank {rank} ran out of memory: {first}\nPeak of rank {rank}: {peak}."
    if category == "hang" and job is not None:
        seconds = job.placement().collective_timeout
        return (
            f"rank {rank} waited {seconds} s (resources.collective_timeout) for another rank that "
            "did not come; the log has the Python stack of every rank. If ranks of this job may "
            f"differ by so much, raise it.\n{text.splitlines()[0]}"
        )
    return f"{type(error).__name__}: {text}"


def quieten() -> None:
    """Keep the notices of libraries out of the log: none of them can be acted on by a user."""
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "peft"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "transformers", "torch.distributed", "colossalai"):
        logging.getLogger(name).setLevel(logging.ERROR)


def first_to_go() -> None:
    """If memory runs out, the kernel is to end a rank, not the orchestrator or a server."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


# What every model class of transformers brings in when the first one is asked for.
MODELS = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")


def preload(files: list[str]) -> None:
    """Import what jobs will import, before ranks are forked. What is wrong, the ranks will say.

    Without files: what all jobs that train need.
    """
    if not files:
        for module in ("rlhf_core.runtime.torchrun", *MODELS):
            importlib.import_module(module)
    for file in files:
        with contextlib.suppress(Exception):
            job = read_job(Path(file))
            for module in (job.module, *(MODELS if job.torchrun else ())):
                importlib.import_module(module)


def main(arguments: list[str]) -> int:
    """What a rank does with its job files; returns the exit code."""
    die_with_parent()  # torchrun, or whoever started this rank
    first_to_go()
    faulthandler.enable()  # NCCL's watchdog, say, ends a process by SIGABRT
    stop.install()
    quieten()
    rank = os.environ.get("RANK", "0")
    name_process(f"rlhf rank {rank}" if "RANK" in os.environ else "rlhf stage")
    for argument in arguments:
        path = Path(argument)
        stop.phase, stop.folder = "idle", path.parent
        job = None
        try:
            job = read_job(path)
            run_job(job, open_store(), path.parent)
        except Exception as error:
            category = classify(error)
            if category in ("internal", "hang", "oom"):
                print(hide(f"rank {rank}:\n{traceback.format_exc()}"), file=sys.stderr, flush=True)
            message = hide(describe(error, category, rank, job))
            print(f"ERROR ({category}): {message}", file=sys.stderr, flush=True)
            write_error(path.parent, rank, category, message)
            stop.settle(message if category == "internal" else "")
            return 1
    return 0
