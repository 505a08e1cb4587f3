"""Ranks killed in the middle of a turn: nothing is lost, and nothing counted twice."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from rlhf_core.errors import TrainingFailure
from rlhf_core.runtime.work import without_measurements
from rlhf_core.store import open_store
from tests.faults.stage import Place
from tests.faults.turns import FOLDER, attempt, make_sums, turns_job
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_HOME", str(folder / "home"))
        return folder, make_sums(folder)


class Watched:
    """A place whose environments note their steps."""

    def __init__(self, sums, folder):
        self.place, self.notes = Place(sums[0], folder), folder / "notes"
        self.notes.mkdir()

    def run(self, job, kill_at=None):
        if kill_at is not None:
            (self.notes / "kill.txt").write_text(str(kill_at))
        self.place.run(job, **{FOLDER: str(self.notes)})
        killed = kill_at is not None and not (self.notes / "kill.txt").exists()
        (self.notes / "kill.txt").unlink(missing_ok=True)
        return killed

    def steps(self):
        """step -> the replies that it was asked with; a list of all."""
        lines = (self.notes / "steps.txt").read_text().splitlines()
        return [(line["step"], line["reply"]) for line in map(json.loads, lines)]

    def metrics(self, job):
        artifact = self.place.result(job)
        text = self.place.store.read_bytes(artifact.digest, "metrics.jsonl").decode()
        return [without_measurements(json.loads(line)) for line in text.splitlines()]


def killed_and_whole(sums, tmp_path, job, points):
    """A job whose ranks are killed at those steps of their attempts, started again after its end
    while points are left, beside one that is not killed; the number of kills."""
    whole = Watched(sums, tmp_path / "whole")
    whole.run(job)
    assert [line["step"] for line in whole.metrics(job)] == list(range(1, job.steps + 1))
    assert len(set(whole.steps())) == len(whole.steps()), "each step comes once"
    turns = sum(line["turns"] for line in whole.metrics(job)) * job.replies
    cut = sum(line["at_limit"] for line in whole.metrics(job)) * job.replies
    # A turn without an end is not asked about.
    assert round(turns - cut) <= len(whole.steps()) <= round(turns)
    assert turns > 1.2 * job.steps * job.replies
    kills, left, round_ = 0, list(points), 0
    while left:
        round_ += 1
        killed = Watched(sums, tmp_path / f"killed-{round_}")
        while killed.place.store.stage_result(job.key()) is None:
            kills += killed.run(job, left.pop() if left else None)
        assert weight_hashes(killed.place.result(job)) == weight_hashes(whole.place.result(job))
        assert killed.metrics(job) == whole.metrics(job), "the counts of turns and calls too"
        # An episode that is sampled again asks the same of its environment, under the same id.
        assert set(killed.steps()) == set(whole.steps())
    return kills


@pytest.mark.long
def test_rank_killed_in_a_turn_ends_in_the_same_bytes(sums, tmp_path):
    # Each rank makes about 13 steps in a rollout: the third one.
    job = turns_job(sums[1], {"ranks": 2})
    assert killed_and_whole(sums, tmp_path, job, [30]) == 1


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("zero2", 1), ("fsdp2", 2)])
def test_ranks_killed_at_random_turns_end_in_the_same_bytes(sums, tmp_path, strategy, ranks):
    chance = random.Random(strategy)
    job = turns_job(sums[1], {"ranks": ranks, "strategy": strategy})
    points = [chance.randint(1, 50 // ranks) for _ in range(40)]
    kills = killed_and_whole(sums, tmp_path, job, points)
    print(f"{kills} kills with {strategy} on {ranks} ranks")
    assert kills >= 34


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_hundred_cuts_in_turns_end_in_the_same_bytes(sums, tmp_path, monkeypatch):
    """In this process, so without a start of ranks for each; its models and optimizer are lost."""
    store, notes = open_store(f"file://{sums[0]}/store"), tmp_path / "notes"
    notes.mkdir()
    (notes / "alive").touch()
    monkeypatch.setenv(FOLDER, str(notes))
    job, chance, cuts, rounds = turns_job(sums[1], {}), random.Random(1), 0, 0

    def finished(key, most):
        nonlocal cuts
        (notes / "steps.txt").unlink(missing_ok=True)
        for number in itertools.count():
            if number < most:
                (notes / "kill.txt").write_text(str(chance.randint(1, 60)))
            try:
                artifact = attempt(job, store, key, tmp_path / key)
            except TrainingFailure as error:
                assert "raised SystemExit: cut" in str(error)
                cuts += 1
            else:
                (notes / "kill.txt").unlink(missing_ok=True)
                text = store.read_bytes(artifact.digest, "metrics.jsonl").decode()
                lines = [without_measurements(json.loads(line)) for line in text.splitlines()]
                steps = set((notes / "steps.txt").read_text().splitlines())
                return weight_hashes(artifact), lines, steps

    whole = finished("whole", 0)
    while cuts < 100:
        rounds += 1
        assert finished(f"round-{rounds}", 20) == whole
