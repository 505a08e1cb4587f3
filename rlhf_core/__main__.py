"""One rank of one or more jobs: `torchrun ... -m rlhf_core FOLDER/job.json [FOLDER/job.json ...]`.

Several jobs run one after another in the same process, which saves the imports of small stages.
Exit code 0: every job's artifact is in the store. 1: error-<rank>.json says why not.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from pydantic import ValidationError

from rlhf_core.context import StageContext
from rlhf_core.errors import ConfigError, RLHFError
from rlhf_core.jobs import Job, parse_job
from rlhf_core.remote_code import allow
from rlhf_core.secrets import hide
from rlhf_core.store import Store, open_store


def read_job(path: Path) -> Job:
    """Read one job file.

    Raises:
        ConfigError: the file is missing, not JSON, or not a job.
    """
    try:
        return parse_job(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read the job file {path}: {error.strerror}.") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part)[:60] for part in item['loc']) or 'the job'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError(f"{path} is not a job file: {'; '.join(problems)[:2000]}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a job file: {error}") from error


def run_job(job: Job, store: Store, folder: Path) -> None:
    """Run one job on this rank; reuse the artifact when the store already holds it."""
    context = StageContext.from_environment(store, job, folder)
    artifact = store.stage_result(context.key)
    if artifact is None:
        allow(job.trust_remote_code)
        module = importlib.import_module(job.module)
        artifact = module.run(job, context)
    if context.main:
        assert artifact is not None, f"{job.module}.run returned no artifact on rank 0"
        result = {"artifact": artifact.digest, "kind": artifact.kind, "key": context.key}
        partial = folder / "result.json.part"
        partial.write_text(json.dumps(result))
        partial.replace(folder / "result.json")


def classify(error: BaseException) -> str:
    """Category of an error (see rlhf_core.errors)."""
    if isinstance(error, RLHFError):
        return error.category
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "oom"
    return "internal"


def quieten() -> None:
    """Keep the notices of libraries out of the log: none of them can be acted on by a user."""
    for module in ("colossalai", "torch", "transformers", "bitsandbytes", "peft"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "transformers", "torch.distributed", "colossalai"):
        logging.getLogger(name).setLevel(logging.ERROR)


def die_with_parent() -> None:
    """Ask the kernel to kill this rank when torchrun (or whoever started it) is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit code."""
    die_with_parent()
    quieten()
    rank = os.environ.get("RANK", "0")
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    for argument in arguments:
        path = Path(argument)
        try:
            job = read_job(path)
            run_job(job, open_store(), path.parent)
        except Exception as error:
            category = classify(error)
            if category == "internal":
                print(hide(traceback.format_exc()), file=sys.stderr)
            message = hide(str(error)) or type(error).__name__
            if category == "internal":
                message = f"{type(error).__name__}: {message}"
            print(f"ERROR ({category}): {message}", file=sys.stderr, flush=True)
            if path.parent.is_dir():
                (path.parent / f"error-{rank}.json").write_text(
                    json.dumps({"category": category, "message": message, "time": time.time()})
                )
            return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Collective threads of a broken process group can block a normal interpreter exit.
    os._exit(code)
