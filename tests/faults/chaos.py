"""Kills at random points: `python -m tests.faults.chaos [KILLS] [--seed SEED] [--s3]` (make chaos).

Each round runs a small stage (SFT, reward model, PPO, DPO, KTO, or GRPO that samples ahead in
processes of its own; one or two ranks; each strategy) and kills it with SIGKILL at random moments
in a random way: one rank, all ranks, the torchrun agent, the orchestrator, a sampler, or everything
at once. `--only separate` takes GRPO alone. It is started again until it ends. Then its weights
must have the sha256 of an undisturbed run's, every artifact that was there before must still be
there, and everything that the store serves must have the bytes that its manifest names.

Exit code 1 if anything is unequal, lost or wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rlhf_core.errors import StoreError
from rlhf_core.jobs import BuiltinRollout, OnlineJob
from rlhf_core.store import Store
from tasks.launchers.usage import rank_of
from tests.faults.stage import Place, end, make_inputs, make_job
from tests.rlhf_core.algorithms.stages import weight_hashes

ALGORITHMS = ("sft", "reward", "ppo", "dpo", "kto", "separate")
RANKS, STRATEGIES = (1, 2), ("ddp", "zero1", "zero2", "fsdp2")
WAYS = ("one rank", "all ranks", "agent", "orchestrator", "everything")
SAMPLER = "sampler"  # another way where there are some
LONGER: dict[str, dict[str, Any]] = {  # so that there is something to be killed in
    "sft": {"max_steps": 60}, "reward": {"max_steps": 60}, "ppo": {"steps": 15},
    "dpo": {"max_steps": 60}, "kto": {"max_steps": 60},
    "separate": {"steps": 15, "max_new_tokens": 12, "epochs": 1, "rollout": BuiltinRollout(
        placement="separate", ranks=2, max_staleness=2, segments=2)},
}  # fmt: skip
MORE_KILLS = 0.3  # chance that a run which was started again is killed once more


@dataclass
class Tally:
    """What is printed at the end."""

    kills: int = 0
    resumes: int = 0
    rounds: int = 0
    equal: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"kills {self.kills}  resumes {self.resumes}  equal results {self.equal} of "
            f"{self.rounds}  artifacts lost {len(self.lost)}  wrong bytes served {len(self.wrong)}"
        )


class Chaos:
    """Rounds of one call, with their references."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        server: Any = None,
        algorithms: Sequence[str] = ALGORITHMS,
    ) -> None:
        self.algorithms = algorithms
        self.folder, self.server = folder, server
        self.random = random.Random(seed)
        self.tally = Tally()
        os.environ["RLHF_HOME"] = str(folder / "home")
        (folder / "base").mkdir()
        self.inputs = make_inputs(folder / "base")
        self.expected: dict[tuple[str, int, str], dict[str, str]] = {}

    def place(self, name: str) -> Place:
        """A new store with the inputs, in files or on the S3 server."""
        if self.server is None:
            return Place(self.folder / "base", self.folder / name)
        from tests.rlhf_core.store.seaweed import BUCKET

        made = Place(self.folder / "base", self.folder / name, f"s3://{BUCKET}/{name}")
        source = Place(self.folder / "base", self.folder / f"{name}-source").store
        for artifact in source.list():
            made.store.publish(
                source.fetch(artifact.digest), kind=artifact.kind,
                metadata=artifact.metadata, parents=artifact.parents,
            )  # fmt: skip
        return made

    def reference(self, case: tuple[str, int, str]) -> dict[str, str]:
        """The weights of a run of this case that nothing happened to."""
        if case not in self.expected:
            place = Place(self.folder / "base", self.folder / "-".join(map(str, case)))
            job = self.job(case)
            place.run(job)
            self.expected[case] = weight_hashes(place.result(job))
        return self.expected[case]

    def job(self, case: tuple[str, int, str]) -> Any:
        algorithm, ranks, strategy = case
        name = "grpo" if algorithm == "separate" else algorithm
        return make_job(
            self.inputs, name, {"ranks": ranks, "strategy": strategy}, **LONGER[algorithm]
        )

    def round(self, number: int, kills_left: int) -> None:
        """One stage, killed once or more, and looked at afterwards."""
        case = (
            self.random.choice(self.algorithms), self.random.choice(RANKS),
            self.random.choice(STRATEGIES),
        )  # fmt: skip
        job, expected, place = self.job(case), self.reference(case), self.place(f"round{number}")
        before = {a.ref for a in place.store.list()}
        told: list[str] = []
        while place.store.stage_result(job.key()) is None:
            assert place.attempts < 12, f"{case} does not come to an end:\n{place.log()[-3000:]}"
            process = place.start(job)
            want = len(told) < kills_left and (not told or self.random.random() < MORE_KILLS)
            if want and (how := self.kill(place, job, process)):
                told.append(how)
            try:
                process.wait(240)
            finally:
                end(process)
            place.wait_for_quiet()
            self.tally.resumes += "going on from the checkpoint" in place.log()
            self.look(place.store, before, f"round {number}, attempt {place.attempts}")
        self.tally.rounds += 1
        self.tally.kills += len(told)
        found = weight_hashes(place.result(job))
        if found == expected:
            self.tally.equal += 1
        else:
            self.tally.unequal.append(f"round {number}: {case}, killed: {told}")
        name = " ".join(map(str, case))
        print(
            f"round {number}: {name}; {', '.join(told) or 'ended before it was killed'}; "
            f"{place.attempts} attempts; {'equal' if found == expected else 'NOT EQUAL'}",
            flush=True,
        )

    def kill(self, place: Place, job: Any, process: Any) -> str:
        """Kill at a random moment; what was done, empty when the stage was faster."""
        way = self.random.choice((*WAYS, SAMPLER) if job.samplers else WAYS)
        total = job.steps if isinstance(job, OnlineJob) else job.max_steps
        # From the ranks' start up to the publishing of the result.
        step = self.random.randint(-1, total)
        while place.steps() < step or not place.processes():
            if process.poll() is not None:
                return ""
            time.sleep(0.005)
        time.sleep(self.random.random() * (2.0 if step < 0 else 0.1))
        at = place.steps()
        family = [p for p in place.processes() if p.pid != process.pid]
        ranks = [p for p in family if rank_of(p) is not None]
        samplers = [p for p in family if p.name() == "rlhf sampler"]
        agents = [p for p in family if p.name() == "rlhf torchrun"]
        if process.poll() is not None:
            return ""
        victims = {
            "one rank": ranks[-1:], "all ranks": ranks, "agent": agents,
            SAMPLER: samplers[:1],
            "orchestrator": [psutil.Process(process.pid)],
            "everything": [psutil.Process(process.pid), *family],
        }[way]  # fmt: skip
        for victim in victims:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.Error:
                return ""
        return f"{way} at step {at} of {total}" if victims else ""

    def look(self, store: Store, before: set[str], when: str) -> None:
        """Count what is lost, and what is served with other bytes than its manifest says."""
        there = {a.ref: a for a in store.list()}
        self.tally.lost += [f"{when}: {ref}" for ref in before - set(there)]
        for ref, artifact in there.items():
            for entry in artifact.files:
                try:
                    data = store.read_bytes(artifact.digest, entry.path)
                except StoreError as error:  # refused, so not served, but gone
                    self.tally.lost.append(f"{when}: {ref} {entry.path}: {error}")
                    continue
                if hashlib.sha256(data).hexdigest() != entry.sha256:
                    self.tally.wrong.append(f"{when}: {ref} {entry.path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", nargs="?", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ALGORITHMS, help="one kind of stage")
    parser.add_argument("--s3", action="store_true", help="on a real S3 server")
    options = parser.parse_args()
    began = time.monotonic()
    server = None
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        if options.s3:
            from tests.rlhf_core.store.seaweed import KEYS, SeaweedServer

            server = SeaweedServer(Path(temporary) / "seaweed")
            server.start()
            os.environ |= {**KEYS, "RLHF_STORE_ENDPOINT": server.endpoint}
        try:
            only = ALGORITHMS if options.only is None else (options.only,)
            chaos = Chaos(Path(temporary), options.seed, server, only)
            number = 0
            while chaos.tally.kills < options.kills:
                number += 1
                chaos.round(number, options.kills - chaos.tally.kills)
        finally:
            if server is not None:
                server.kill()
    tally = chaos.tally
    for line in (*tally.unequal, *tally.lost, *tally.wrong):
        print(line)
    print(f"{tally}  in {time.monotonic() - began:.0f} s (seed {options.seed})")
    return 1 if tally.unequal or tally.lost or tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
