"""The control plane under load: `python -m tests.system.load [--pipelines 200] [--slots 50]`
(make load).

Pipelines whose stages are stand-ins (they wait, and publish small artifacts) are submitted one
after another, as fast as the server takes them: one Prefect server, one worker for pipelines, and
one for stages with many slots. They share model and data, for which the first ones all ask at once,
and differ in every stage after it. Then

- every pipeline must have completed at its first attempt,
- no stage may have run twice,
- no process, no slot and no lease may be left.

It prints what the server needed, for docs/scale.md. Exit code 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from flows.cli.remote import PIPELINE
from rlhf_core.pipeline.presets import load_preset
from tests.system.conftest import FINAL, System
from tests.system.soak import Soak

STAGES = ["sft"]
STAND_INS = ("sft", "evaluate")  # the least that a pipeline has
SERVER = "flows.api_server"
PAGE = 200  # flow runs that the server lists at once
PATIENCE = 300  # seconds for processes of completed runs to send their events to a busy server


class Load(Soak):
    """A soak without faults, whose pipelines are submitted by the API without a pause."""

    def __init__(self, system: System, pipelines: int) -> None:
        super().__init__(system, pipelines, seed=0)
        self.states: dict[str, dict[str, Any]] = {}
        self.memory: dict[str, int] = {}

    def submit_all(self) -> float:
        """Submit every pipeline; returns seconds."""
        deployment = self.system.get(f"/deployments/name/{PIPELINE}")["id"]
        base = {**load_preset("smoke"), "stages": STAGES, "launcher": {"type": "work_pool"}}

        def one(number: int) -> str:
            sft = {**base["sft"], "learning_rate": 1e-6 * (number + 1)}
            config = {**base, "name": f"load-{number}", "sft": sft}
            # The key lets a request that got no answer be sent again.
            body = {
                "name": config["name"],
                "parameters": {"config": config},
                "idempotency_key": config["name"],
            }
            path = f"/deployments/{deployment}/create_flow_run"
            while True:
                try:
                    return str(self.system.post(path, body)["id"])
                except httpx.TimeoutException:
                    self.say("no answer: to a submission")

        began = time.monotonic()
        self.runs = [one(number) for number in range(self.pipelines)]
        return time.monotonic() - began

    def measure(self) -> None:
        """The greatest memory of the server, and of the processes of both workers."""
        for name, words in {"server": SERVER, "all": ""}.items():
            total = 0
            for process in self.system.processes(*filter(None, [words])):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has ended meanwhile
                    continue
            self.memory[name] = max(self.memory.get(name, 0), total)

    def watch(self, minutes: float) -> None:
        """Wait until every pipeline has ended."""
        deadline, measured = time.monotonic() + 60 * minutes, 0.0
        while len(self.done) < self.pipelines and time.monotonic() < deadline:
            time.sleep(5)
            if time.monotonic() - measured > 30:
                measured = time.monotonic()
                threading.Thread(target=self.measure, daemon=True).start()
            try:
                self.read_states()
            except httpx.HTTPError as error:
                self.say(f"no answer: {type(error).__name__}")
                continue
            count = {state: 0 for state in ("COMPLETED", "RUNNING")}
            for run in self.states.values():
                count[run["state_type"]] = count.get(run["state_type"], 0) + 1
            self.done = {i for i, run in self.states.items() if run["state_type"] in FINAL}
            self.say("state: " + ", ".join(f"{n} {state.lower()}" for state, n in count.items()))

    def read_states(self) -> None:
        """The states of all pipelines, by pages."""
        for start in range(0, self.pipelines, PAGE):
            body = {"flow_runs": {"id": {"any_": self.runs[start : start + PAGE]}}, "limit": PAGE}
            self.states |= {run["id"]: run for run in self.system.post("/flow_runs/filter", body)}

    def not_completed(self) -> Iterator[str]:
        """Pipelines that did not complete at their first attempt."""
        for run in self.states.values():
            if run["state_type"] != "COMPLETED" or run["run_count"] != 1:
                yield f"{run['name']} is {run['state_name']}, attempt {run['run_count']}"

    def incomplete_work(self) -> Iterator[str]:
        """Stages that did not begin and end exactly once."""
        lines = [line.split()[:3] for line in self.journal.read_text().splitlines()]
        begun, ended = (
            [key for kind, _, key in lines if kind == what] for what in ("begin", "end")
        )
        for what, keys in (("begun", begun), ("ended", ended)):
            if len(keys) > len(set(keys)):
                yield f"{len(keys)} stages have {what}, {len(set(keys))} different ones"
        if set(begun) != set(ended):
            yield f"{len(set(begun) ^ set(ended))} stages have begun or ended, not both"
        if len(set(ended)) < len(STAND_INS) * self.pipelines:
            yield f"{len(set(ended))} stages, not {len(STAND_INS)} for each pipeline"

    def figures(self, submitting: float, took: float) -> Iterator[str]:
        """What it took.

        Args:
            submitting, took: seconds until all were submitted and completed.
        """
        spans = sorted(run["total_run_time"] for run in self.states.values())
        stages = self.journal.read_text().count("end ")
        rate = 60 * self.pipelines / submitting
        yield f"submitted in {submitting:.0f} s, {rate:.0f} a minute"
        yield f"completed after {took:.0f} s: {60 * stages / took:.0f} of {stages} stages a minute"
        yield f"a pipeline ran {statistics.median(spans):.0f} s (median), {spans[-1]:.0f} s (most)"
        for name, size in self.memory.items():
            yield f"memory of {name}: {size / 2**20:.0f} MiB"
        [database] = (Path(self.system.environment["RLHF_HOME"])).rglob("prefect.db")
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
            for table in ("flow_run", "task_run", "log", "events"):
                [count] = opened.execute(f"SELECT count(*) FROM {table}").fetchone()
                yield f"rows of {table}: {count}, {count / self.pipelines:.0f} a pipeline"
        yield f"database: {database.stat().st_size / 2**20:.0f} MiB"
        for process in self.system.processes(SERVER):
            times = process.cpu_times()
            yield f"server: {times.user + times.system:.0f} s of processor time"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.load", description=__doc__)
    parser.add_argument("--pipelines", type=int, default=200)
    parser.add_argument("--slots", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=60, help="pipelines that run at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="that a stage works")
    parser.add_argument("--minutes", type=float, default=60.0, help="to wait for all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlhf-load-") as folder:
        system = System(Path(folder))
        load = Load(system, options.pipelines)
        try:
            system.up(options.slots)
            system.log_in()
            limit = {"concurrency_limit": options.at_once}
            system.ask("PATCH", "/work_pools/control", limit)
            system.plan(**{name: [f"wait:{options.seconds}"] for name in STAND_INS})
            load.began = time.monotonic()
            submitting = load.submit_all()
            load.watch(options.minutes)
            completed = time.monotonic()
            found = [*load.not_completed(), *load.incomplete_work(), *load.problems(PATIENCE)]
            ended = time.monotonic() - completed
            print("\n".join(load.figures(submitting, completed - load.began)))
            print(f"the last process of a run ended {ended:.0f} s after the last run")
        finally:
            system.rlhf("down", "--now")
        found += [f"process {p.pid} is left after down" for p in system.processes()]
    for problem in found:
        print(f"PROBLEM {problem}")
    print("none lost, none run twice, nothing left" if not found else f"{len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
