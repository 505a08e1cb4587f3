"""A system under faults: `python -m tests.system.soak [--pipelines 20] [--minutes 10]` (make soak).

Pipelines of stand-in stages (an S3 store, two slots) run while workers, pipelines, stages and ranks
are killed at random, the Prefect server is killed twice, and the store once stays away for a
minute. A pipeline that ends in any other way than completed is retried, as its user would do. Then

- every pipeline must have completed,
- nothing may have run twice: no stage begins again after its result is in the store, or while an
  earlier attempt lives,
- no process, no slot of a pool and no lease may be left, before `rlhf down` and after it.

Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.system.conftest import PATIENCE, System, kill_with_family

SECONDS = 5  # that each stage works
KILL_EVERY = (8.0, 25.0)
AWAY = 60.0  # seconds without the store
STUCK = 3.0 * PATIENCE  # times the given minutes, until pipelines count as stuck


class Soak:
    """The runs, and what is done to them."""

    def __init__(self, system: System, pipelines: int, seed: int) -> None:
        self.system, self.random = system, random.Random(seed)
        self.journal = system.folder / "journal"
        system.environment["STUB_JOURNAL"] = str(self.journal)
        self.pipelines = pipelines
        self.runs: list[str] = []
        self.done: set[str] = set()
        self.told: dict[str, int] = defaultdict(int)
        self.began = time.monotonic()

    def say(self, what: str) -> None:
        self.told[what.partition(":")[0]] += 1
        print(f"{time.monotonic() - self.began:5.0f} s  {what}", flush=True)

    # ------------------------------------------------------------------ faults

    def faults(self, minutes: float) -> Iterator[None]:
        """Advance once a second; each step may do something."""
        marks: list[tuple[float, Callable[[], None]]] = [
            (0.25, self.kill_server), (0.45, self.store_away), (0.7, self.kill_server)
        ]  # fmt: skip
        next_kill = time.monotonic() + KILL_EVERY[1]
        while marks or time.monotonic() - self.began < 60 * minutes:
            share = max(
                len(self.done) / self.pipelines, (time.monotonic() - self.began) / (60 * minutes)
            )
            if marks and share >= marks[0][0]:
                marks.pop(0)[1]()
            elif time.monotonic() >= next_kill:
                self.kill_something()
                next_kill = time.monotonic() + self.random.uniform(*KILL_EVERY)
            yield

    def kill_something(self) -> None:
        """One of the processes that may die: a worker alone or with all that it has started, a
        pipeline or a stage's flow run, or a rank."""
        kind = self.random.choice(("worker", "machine", "flow run", "rank"))
        pool = self.random.choice(("control", "gpu"))
        if kind == "rank":
            found = self.system.processes("rlhf_core.runtime.fork_server")
        else:
            found = self.system.processes("worker start", f"--pool {pool}")
        if kind == "flow run":
            found = [p for w in found for p in w.children() if "client.py" in " ".join(p.cmdline())]
        if not found:
            return
        victim = self.random.choice(found)
        self.say(f"kill: {kind}{'' if kind == 'rank' else f' of {pool}'} ({victim.pid})")
        if kind == "machine":
            kill_with_family(victim)
        else:
            victim.kill()

    def kill_server(self) -> None:
        self.say("restart: the Prefect server")
        for process in self.system.processes("flows.api_server"):
            process.kill()

    def store_away(self) -> None:
        self.say(f"away: the store, for {AWAY:.0f} s")
        with self.system.paused():
            for process in self.system.processes("weed"):
                process.kill()
            time.sleep(AWAY)

    # ------------------------------------------------------------------ runs

    def submit(self) -> None:
        number = len(self.runs)
        run = self.system.submit(  # two share all but PPO
            f"seed={number // 2}",
            f"ppo.kl_coef={0.1 + number % 2 / 10}",
            f"name=soak-{number}",
            "publish.name=soak",  # all of them: they promote beside each other
        )
        self.runs.append(run)
        self.say(f"submitted: soak-{number} ({run[:8]})")

    def look_after(self) -> None:
        """Notice what has completed, and retry what has ended in another way."""
        for run in self.runs:
            if run in self.done:
                continue
            state = self.system.run(run)
            if state["state_type"] == "COMPLETED":
                self.done.add(run)
                self.say(f"completed: {state['name']}, {len(self.done)} of {self.pipelines}")
            elif state["state_type"] in ("FAILED", "CRASHED", "CANCELLED"):
                reason = (state["state"]["message"] or "").splitlines() or [""]
                self.say(f"retry: {state['name']}, {state['state_name']}, {reason[0][:120]}")
                self.system.rlhf("retry", run[:8])

    def go(self, minutes: float) -> None:
        """Run everything until all is done, or has had long enough."""
        self.began = time.monotonic()
        faults, quiet = self.faults(minutes), False
        while len(self.done) < self.pipelines or not quiet:
            if time.monotonic() - self.began > 60 * minutes * STUCK:
                break
            quiet = next(faults, "over") == "over"
            try:
                if len(self.runs) < self.pipelines:
                    self.submit()
                self.look_after()
            except (httpx.HTTPError, AssertionError) as error:  # the server is away
                self.say(f"no answer: {type(error).__name__}")
            time.sleep(1)

    # ------------------------------------------------------------------ what must hold

    def problems(self, patience: float = 60) -> Iterator[str]:
        """What does not hold.

        Args:
            patience: seconds for the processes of flow runs, which send their last events to the
                server after their runs have completed.
        """
        for run in self.runs:
            if run not in self.done:
                state = self.system.run(run)
                yield f"{state['name']} is {state['state_name']}: {state['state']['message']}"
        yield from self.twice()
        deadline = time.monotonic() + patience
        while (left := [*self.processes(), *self.held()]) and time.monotonic() < deadline:
            time.sleep(1)
        yield from left

    def twice(self) -> Iterator[str]:
        """Stages that ran although they had been done, or beside themselves."""
        ended: set[str] = set()
        for line in self.journal.read_text().splitlines():
            what, algorithm, key, _, _, others = (*line.split(), "")[:6]
            if what == "begin" and key in ended:
                yield f"{algorithm} {key[:12]} began again after its end"
            if what == "begin" and others:
                yield f"{algorithm} {key[:12]} began beside {others}"
            if what == "end":
                ended.add(key)

    def processes(self) -> Iterator[str]:
        """Flow runs' and stages' processes that still run."""
        for words in ("client.py", "prefect.engine", "rlhf_core.runtime.fork_server"):
            for process in self.system.processes(words):
                yield f"process {process.pid} is left: {words}"

    def held(self) -> Iterator[str]:
        """Flow runs that still take a slot, and concurrency limits that are held."""
        states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING", "SCHEDULED"]}}
        body: dict[str, Any] = {"flow_runs": {"state": states}, "sort": "START_TIME_ASC"}
        for run in self.system.post("/flow_runs/filter", body):
            if not run["auto_scheduled"]:
                yield f"{run['name']} ({run['id']}) is still {run['state_name']}"
        for limit in self.system.post("/v2/concurrency_limits/filter"):
            if limit["active_slots"]:
                yield f"limit {limit['name']} has {limit['active_slots']} slots held"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.soak", description=__doc__)
    parser.add_argument("--pipelines", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="rlhf-soak-") as folder:
        system = System(Path(folder))
        soak = Soak(system, options.pipelines, options.seed)
        work = [f"wait:{SECONDS}"]
        algorithms = ("sft", "label", "reward", "ppo", "evaluate")
        try:
            system.up()
            system.log_in()
            system.plan(**dict.fromkeys(algorithms, work))
            soak.go(options.minutes)
            found = list(soak.problems())
        finally:
            system.rlhf("down", "--now")
        found += [f"process {p.pid} is left after down" for p in system.processes()]
    counts = ", ".join(f"{name} {count}" for name, count in sorted(soak.told.items()))
    print(f"{len(soak.done)} of {options.pipelines} completed; {counts}")
    for problem in found:
        print(f"PROBLEM {problem}")
    print("nothing ran twice, and nothing is left" if not found else f"{len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
