"""Stands in for rlhf_core's ranks: `python -m rlhf_stub FOLDER/job.json ...`, without torch.

It publishes small artifacts through the real store. STUB_PLAN, a JSON file, says what else happens:
{"<algorithm>": ["oom", "ok", ...]}, one behaviour per attempt, the last one for ever.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from rlhf_core.errors import (
    ConfigError,
    DataError,
    OutOfMemory,
    PolicyCollapse,
    RLHFError,
    StoreUnavailable,
)
from rlhf_core.jobs import parse_job
from rlhf_core.runtime import candidates
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import open_store
from rlhf_core.system.secrets import redact

ERRORS = {
    "oom": OutOfMemory, "data": DataError, "store": StoreUnavailable, "config": ConfigError,
    "collapse": PolicyCollapse,
}  # fmt: skip


def behaviour(algorithm: str, folder: Path) -> str:
    plan_file = os.environ.get("STUB_PLAN")
    if not plan_file or not Path(plan_file).exists():
        return "ok"
    plan = json.loads(Path(plan_file).read_text()).get(algorithm, ["ok"])
    attempt = folder.name.rpartition("-")[2]
    number = int(attempt) if attempt.isdigit() else 1
    return plan[min(number, len(plan)) - 1]


def act(what: str, rank: int, folder: Path) -> None:
    if what in ERRORS:
        raise ERRORS[what](f"stub ran into {what}")
    if what == "leak":  # as a library does that logs its settings
        print("settings:", dict(os.environ), flush=True)
        raise ValueError(f"refused with {os.environ['HF_TOKEN']}")
    if what == "bug":
        raise ZeroDivisionError("stub divided")
    if what == "die" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die":
        time.sleep(60)
    if what == "lost_peer":  # the secondary failure comes a little before the reason
        mark = folder / "rank-0-is-there"
        if rank == 1:
            while not mark.exists():
                time.sleep(0.001)
            raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")
        mark.touch()
        time.sleep(0.05)
        raise DataError("row 7 has no text")
    if what == "silent_kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what.startswith("wait:"):  # and go on
        Path(os.environ["STUB_PIDS"]).joinpath(str(os.getpid())).touch()
        time.sleep(float(what.removeprefix("wait:")))
    if what == "silent":
        os._exit(3)
    if what == "forked":
        torch = sys.modules.get("torch")
        found = {
            "parents": [p.pid for p in psutil.Process().parents()], "preloaded_by": preloaded_by,
            "preloaded": preloaded,
            "threads": torch and torch.get_num_threads(), "SEEN": os.environ.get("SEEN"),
        }  # fmt: skip
        (folder / f"forked-{rank}.json").write_text(json.dumps(found))
    if what in ("sleep", "stubborn"):
        if what == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        Path(os.environ["STUB_PIDS"]).joinpath(str(os.getpid())).touch()
        time.sleep(300)


def journal(what: str, algorithm: str, key: str) -> None:
    """Write down for tests/system/soak.py what runs, and which other processes run the same."""
    if not (path := os.environ.get("STUB_JOURNAL")):
        return
    others = []
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            _, _, other, pid, started, *_ = line.split()
            with contextlib.suppress(psutil.Error):
                if other == key and str(psutil.Process(int(pid)).create_time()) == started:
                    others.append(pid)
    own = psutil.Process()
    others = [pid for pid in others if int(pid) != own.pid]
    with open(path, "a") as file:
        file.write(f"{what} {algorithm} {key} {own.pid} {own.create_time()} {','.join(others)}\n")


def run(path: Path) -> None:
    job = parse_job(path.read_bytes())
    context = StageContext.from_environment(open_store(), job, path.parent)
    planned = behaviour(job.algorithm, path.parent)
    if planned == "collapse_late" and context.main:  # with a good checkpoint from before
        folder = context.scratch("candidate")
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"good")
        metadata = {"reason": "collapsed at step 9", "metrics": {"steps": 7}}
        left = context.publish(job, folder, metadata, bind=False)
        candidates.write(context.store, context.key, left)
        planned = "collapse"
    done = context.store.stage_result(context.key) if context.main else None
    if done is not None:  # as a rank does (rlhf_core.runtime.rank)
        result = {"artifact": done.digest, "kind": done.kind, "key": context.key}
        (path.parent / "result.json").write_text(json.dumps(result))
        return
    if context.main:
        journal("begin", job.algorithm, context.key)
    act(planned, context.rank, path.parent)
    if not context.main:
        return
    folder = context.scratch("result")
    context.log(f"stub runs {job.algorithm}")
    for step in range(1, 4):
        metrics = {"loss": 3.0 / step, "score": step / 3, "kl": 0.1 * step}
        context.log_metrics(step, 3, metrics)
    metrics = {"loss": 1.0}
    if job.kind in ("model", "reward_model"):
        (folder / "config.json").write_text(json.dumps({"stage": job.algorithm}))
        (folder / "model.safetensors").write_bytes(job.algorithm.encode())
    if job.kind == "dataset":
        (folder / "card.json").write_text(json.dumps({"read": 10, "kept": 8, "dropped": 2}))
    if job.kind == "benchmarks":
        rows = {task: {"acc,none": {"value": 0.5, "stderr": 0.1}} for task in job.tasks}
        numbers = {"shown": list(job.tasks), "models": {"base": rows, "policy": rows}}
        (folder / "lm_eval.json").write_text(json.dumps(numbers))
    if job.kind == "evaluation":
        found = json.loads(Path(__file__).with_name("evaluation.json").read_text())
        if planned == "hacked":  # the reward rises, and every reply is the same
            found["models"]["sft"] |= {"distinct_2": 0.9, "top_opening": 0.05}
            one = {"distinct_2": 0.02, "top_opening": 0.97, "opening": "i love a"}
            found["models"]["policy"] |= one
        (folder / "evaluation.json").write_text(json.dumps(found))
        (folder / "samples.jsonl").write_bytes(
            Path(__file__).with_name("samples.jsonl").read_bytes()
        )
    artifact = context.publish(job, folder, {"metrics": metrics})
    result = {"artifact": artifact.digest, "kind": artifact.kind, "key": context.key}
    journal("end", job.algorithm, context.key)
    (path.parent / "result.json").write_text(json.dumps(result))


preloaded_by: int | None = None
preloaded: list[int] = []  # numbers of files


def preload(files: list[str]) -> None:
    global preloaded_by
    preloaded_by = os.getpid()
    preloaded.append(len(files))


def main(arguments: list[str]) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for argument in arguments:
        path = Path(argument)
        try:
            run(path)
        except Exception as error:
            category = error.category if isinstance(error, RLHFError) else "internal"
            message = str(error) if category != "internal" else f"{type(error).__name__}: {error}"
            value = {"category": category, "message": redact(message), "time": time.time()}
            rank = os.environ.get("RANK", "0")
            (path.parent / f"error-{rank}.json").write_text(json.dumps(value))
            print(f"ERROR ({category}): {message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
