"""Reuse by stage key, and what an out-of-memory failure changes."""

import logging
import time

import pytest

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import ImportModelJob, LabelJob, PipelineConfig, PPOJob, Resources, SFTJob
from tasks import execute
from tasks.launchers import Outcome
from tasks.run import Run

D = "0" * 64
LOG = logging.getLogger("test")


class FakeLauncher:
    """Publishes through the store, or fails as it is told.

    Attributes:
        work: seconds that each job says it took. queue: seconds before the first one.
    """

    work, queue = 3.0, 0.0

    def __init__(self, store, *failures):
        self.store, self.failures, self.launches = store, list(failures), []

    def run(self, launch, on_output, on_progress):
        self.launches.append(launch)
        launch.log.parent.mkdir(parents=True)
        time.sleep(self.queue)
        if self.failures:
            raise JobFailed("sft failed: no room", self.failures.pop(0))
        outcomes = []
        for job in launch.jobs.values():
            artifact = self.store.publish_derived(kind=job.kind, files={"x": job.key().encode()})
            work = {
                "seconds": self.work,
                "throughput": {"tokens_per_second": 7.0},
                "steps": {"step": [1]},
            }
            self.store.commit_stage(job.key(), artifact, work)
            outcomes.append(Outcome(artifact.digest, artifact.kind, job.key()))
        return outcomes


@pytest.fixture
def start(monkeypatch, tmp_path, store):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))

    def make(*failures):
        launcher = FakeLauncher(store, *failures)
        monkeypatch.setattr(execute, "launcher_for", lambda settings: launcher)
        return Run(PipelineConfig(), "run-1", store), launcher

    return make


def job(micro=8, ranks=2, batch=48):
    resources = Resources(ranks=ranks, micro_batch_size=micro)
    return SFTJob(model=D, data=D, batch_size=batch, resources=resources)


def test_stage_in_the_store_is_not_launched_again(start):
    run, launcher = start()
    first = execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    again = execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    assert [r.reused for r in (*first, *again)] == [False, True]
    assert first[0].digest == again[0].digest
    assert len(launcher.launches) == 1


def test_work_is_that_of_the_run_that_made_the_result(start):
    run, _ = start()
    for _ in range(2):
        [result] = execute.run_jobs(run, "sft", {"sft": job()}, LOG)
        assert result.work == {"seconds": 3.0, "throughput": {"tokens_per_second": 7.0}}
        assert result.metrics == {} and result.shown == {"tokens_per_second": 7.0}
    assert run.store.read_record(run.record_path)["stages"]["sft"]["work"]["seconds"] == 3.0


def test_waiting_stands_apart_from_work_and_counts_once_for_jobs_that_wait_together(start):
    run, launcher = start()
    launcher.work, launcher.queue = 0.05, 0.3
    jobs = {f"m{i}": ImportModelJob(seed=i) for i in range(2)}
    first, second = execute.run_jobs(run, "models", jobs, LOG)
    assert first.worked == second.worked == second.seconds == 0.05
    assert 0.2 < first.seconds < 5
    [again] = execute.run_jobs(run, "m1", {"m1": jobs["m1"]}, LOG)
    assert again.reused and again.worked == 0 and again.work["seconds"] == 0.05


def test_failed_attempts_are_part_of_the_time_of_a_stage(start):
    run, launcher = start("lost")
    launcher.work, launcher.queue = 0.01, 0.31
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    [result] = execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    assert result.seconds > 0.6 and result.worked == 0.01


def test_placement_does_not_count(start):
    run, launcher = start()
    execute.run_jobs(run, "sft", {"sft": job(ranks=2)}, LOG)
    execute.run_jobs(run, "sft", {"sft": job(ranks=1, micro=4)}, LOG)
    assert len(launcher.launches) == 1


def test_only_missing_jobs_of_a_group_are_launched(start):
    run, launcher = start()
    jobs = {f"m{i}": ImportModelJob(seed=i) for i in range(3)}
    execute.run_jobs(run, "models", {"m1": jobs["m1"]}, LOG)
    results = execute.run_jobs(run, "models", jobs, LOG)
    assert [r.stage for r in results] == ["m0", "m1", "m2"]
    assert [r.reused for r in results] == [False, True, False]
    assert list(run.stages) == ["m0", "m1", "m2"], "or model cards would depend on what was reused"
    assert list(launcher.launches[1].jobs.values()) == [jobs["m0"], jobs["m2"]]


def sizes(launcher):
    return [next(iter(x.jobs.values())).placement().micro_batch_size for x in launcher.launches]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_key(start):
    run, launcher = start("oom", "oom")
    for _ in range(2):
        with pytest.raises(JobFailed) as caught:
            execute.run_jobs(run, "sft", {"sft": job()}, LOG)
        assert caught.value.category == "oom"
    [result] = execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    assert sizes(launcher) == [8, 4, 2]
    assert result.key == job().key()
    assert len({str(x.log) for x in launcher.launches}) == 3  # a folder for every attempt
    assert run.store.list_records("memory/") == []  # nothing is left of it


def test_third_out_of_memory_is_final_and_names_settings(start):
    run, launcher = start("oom", "oom", "oom")
    for _ in range(3):
        with pytest.raises(JobFailed) as caught:
            execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    assert caught.value.category == "memory"  # not one that is tried again
    assert "micro_batch_size was halved 2 times already and is 2. Set " in str(caught.value)
    assert "sft.resources.strategy zero2" in str(caught.value)
    assert sizes(launcher) == [8, 4, 2]


def test_halved_micro_batch_is_known_to_another_process(start):
    run, launcher = start("oom")
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    other, second = start()  # all that they share is the store
    execute.run_jobs(other, "sft", {"sft": job()}, LOG)
    assert (sizes(launcher), sizes(second)) == ([8], [4])


def test_changed_placement_starts_with_what_it_says(start):
    run, launcher = start("oom")
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    execute.run_jobs(run, "sft", {"sft": job(ranks=4, micro=12)}, LOG)
    assert sizes(launcher) == [8, 12]


def test_halved_micro_batch_divides_the_share_of_a_minibatch(start):
    run, launcher = start("oom")
    ppo = PPOJob(model=D, reward_model=D, prompts=D, batch_size=48, minibatches=2,
                 resources=Resources(ranks=2, micro_batch_size=12))  # fmt: skip
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "ppo", {"ppo": ppo}, LOG)
    execute.run_jobs(run, "ppo", {"ppo": ppo}, LOG)
    assert sizes(launcher) == [12, 6]


def test_halved_micro_batch_divides_the_batch(start):
    run, launcher = start("oom")
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "sft", {"sft": job(micro=9, batch=18)}, LOG)
    execute.run_jobs(run, "sft", {"sft": job(micro=9, batch=18)}, LOG)
    assert sizes(launcher) == [9, 3]


def test_stage_without_a_batch_size_is_halved_too(start):
    run, launcher = start("oom")
    label = LabelJob(model=D, prompts=D, resources=Resources(micro_batch_size=5))
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "label", {"label": label}, LOG)
    execute.run_jobs(run, "label", {"label": label}, LOG)
    assert sizes(launcher) == [5, 2]


def test_smallest_micro_batch_out_of_memory_is_final(start):
    run, _ = start("oom")
    with pytest.raises(JobFailed, match="cannot be made smaller") as caught:
        execute.run_jobs(run, "sft", {"sft": job(micro=1)}, LOG)
    assert caught.value.category == "memory"  # not one that is tried again


def test_other_failures_change_nothing(start):
    run, launcher = start("lost")
    with pytest.raises(JobFailed):
        execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    execute.run_jobs(run, "sft", {"sft": job()}, LOG)
    assert sizes(launcher) == [8, 8]
