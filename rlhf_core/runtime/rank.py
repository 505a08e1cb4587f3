"""One rank: it runs its job files, or writes why one failed.

An exception is written to `error-<rank>.json` with its category (`rlhf_core.errors`). From the
category the orchestrator decides whether to retry.
"""

from __future__ import annotations

import contextlib
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
from rlhf_core.jobs.training import TrainSettings
from rlhf_core.model_files.remote_code import allow
from rlhf_core.runtime.agreement import decided
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.job_file import read_job
from rlhf_core.runtime.stopping import PEER_LOST, explained, stop, write_error
from rlhf_core.store import Store, open_store
from rlhf_core.system.host_memory import format_bytes, is_out_of_memory, peak_memory
from rlhf_core.system.processes import die_with_parent, name_process
from rlhf_core.system.secrets import redact


def run_job(job: Job, store: Store, folder: Path) -> None:
    """Run one job on this rank, or reuse the artifact if the store has it."""
    context = StageContext.from_environment(store, job, folder)
    artifact = store.stage_result(context.key) if context.main else None
    if not decided(lambda: artifact is not None, job.placement().collective_timeout):
        allow(job.trust_remote_code)
        module = importlib.import_module(job.module)
        if not job.placement().fast_paths:
            context.log("resources.fast_paths is false: transformers' own code runs everywhere")
        with context.closing, fast_paths_as_set(job):
            artifact = module.run(job, context)
    if context.main:
        assert artifact is not None, f"{job.module}.run returned no artifact on rank 0"
        result = {"artifact": artifact.digest, "kind": artifact.kind, "key": context.key}
        partial = folder / "result.json.part"
        partial.write_text(json.dumps(result))
        partial.replace(folder / "result.json")


@contextlib.contextmanager
def fast_paths_as_set(job: Job) -> Iterator[None]:
    """Inside the block, fast paths are on or off in this process as the job's resources say."""
    if job.placement().fast_paths:
        yield
        return
    from rlhf_core.nn.fast_paths import switched  # imports torch, which some stages do not need

    with switched(False):
        yield


# In messages of gloo and NCCL about a collective operation that a rank did not join in time.
TIMED_OUT = re.compile(r"timed out waiting|collective operation timeout|wait timeout", re.I)


def classify(error: BaseException) -> str:
    """Category of an error (see rlhf_core.errors)."""
    if isinstance(error, RLHFError):
        return error.category
    if any(is_out_of_memory(e) for e in causes(error)):
        return "oom"
    return "hang" if TIMED_OUT.search(str(error)) else "internal"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its chain of causes: a library may wrap an out-of-memory error in its own."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def describe(error: BaseException, category: str, rank: str, job: Job | None) -> str:
    """The message of the error file."""
    text = str(error) or type(error).__name__
    if isinstance(error, RLHFError):
        return text
    if category == "oom":
        peak = ", ".join(f"{format_bytes(size)} {where}" for where, size in peak_memory().items())
        first = text.splitlines()[0]
        return f"rank {rank} ran out of memory: {first}\nPeak of rank {rank}: {peak}."
    if category == "hang" and job is not None:
        seconds = job.placement().collective_timeout
        return (
            f"rank {rank} waited {seconds} s (resources.collective_timeout) for another rank in a "
            "collective operation; the log has the Python stack of every rank. If ranks of this "
            f"job can legitimately be this far apart, raise the timeout.\n{text.splitlines()[0]}"
        )
    return f"{type(error).__name__}: {text}"


def silence_libraries() -> None:
    """Keep warnings of libraries out of the log: users cannot act on any of them."""
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "peft"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "transformers", "torch.distributed", "colossalai"):
        logging.getLogger(name).setLevel(logging.ERROR)


def show_own_warnings() -> None:
    """Warnings of this project go to the stage's log, with the rank where there are several."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"rank {rank}: " if size != "1" else ""
    logger, handler = logging.getLogger("rlhf_core"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)


def prefer_as_oom_victim() -> None:
    """If memory runs out, let the kernel kill a rank rather than the orchestrator or a server."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


# What transformers imports with the first model class.
MODEL_MODULES = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")
# What `Strategy.prepare` imports: two seconds, with peft and bitsandbytes.
STRATEGY_MODULES = ("colossalai.booster",)


def preload(files: list[str]) -> None:
    """Import what jobs need, before ranks are forked. Errors are left for the ranks to report.

    Args:
        files: job files; empty: import what every job with a model needs.
    """
    silence_libraries()
    if not files:
        for module in ("rlhf_core.runtime.torchrun", *MODEL_MODULES):
            importlib.import_module(module)
    for file in files:
        with contextlib.suppress(Exception):
            job = read_job(Path(file))
            models = MODEL_MODULES if job.torchrun else ()
            strategy = STRATEGY_MODULES if isinstance(job, TrainSettings) else ()
            for module in (job.module, *models, *strategy):
                importlib.import_module(module)


def main(arguments: list[str]) -> int:
    """Run the job files on this rank; returns the exit code."""
    die_with_parent()  # torchrun, or the process that started the only rank
    prefer_as_oom_victim()
    faulthandler.enable()  # NCCL's watchdog, for one, ends a process by SIGABRT
    stop.install()
    silence_libraries()
    show_own_warnings()
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
            lost = report(error, path.parent, rank, job)
            stop.wait_before_failing(lost)
            return 1
    return 0


def report(error: Exception, folder: Path, rank: str, job: Job | None) -> str:
    """Write a rank's error to the log and to its error file.

    A rank that has lost another one shows nothing where that one has told the user why: its
    traceback would hide the reason.

    Returns:
        The message of an internal error, which may say that another rank is lost; else "".
    """
    category = classify(error)
    message = redact(describe(error, category, rank, job))
    internal = message if category == "internal" else ""
    if not (PEER_LOST.search(internal) and explained(folder)):
        if category in ("internal", "hang", "oom"):
            trace = "".join(traceback.format_exception(error))
            print(redact(f"rank {rank}:\n{trace}"), file=sys.stderr, flush=True)
        print(f"ERROR ({category}): {message}", file=sys.stderr, flush=True)
    write_error(folder, rank, category, message)
    return internal
