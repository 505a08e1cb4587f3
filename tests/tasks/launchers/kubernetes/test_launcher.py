"""The launcher against an API server over HTTP, through the official client."""

import threading
import time

import pytest

from rlhf_core.errors import ConfigError, JobFailed
from tests.tasks.launchers.kubernetes.conftest import JOB, Agents, nothing_is_left, wait_for


def test_job_returns_its_artifact_output_and_progress(run, cluster, store, tmp_path):
    [outcome], lines, progress = run()
    assert outcome.artifact == store.stage_result(JOB.key()).digest
    assert {line.partition(" of")[0] for line in lines} >= {"agent 0", "agent 1"}
    assert {"step": 3, "total": 3, "loss": 1.5} in progress
    assert "node 1: agent 1" in (tmp_path / "log.txt").read_text()
    assert not any("rlhf-progress" in line for line in lines)
    assert nothing_is_left(cluster)
    assert store.list_records("launches/") == []


def test_retryable_failure_starts_all_pods_again_and_agents_know_the_attempt(run, cluster, agents):
    agents.plan = {(0, 1): "lost", (0, 0): Agents.until_stopped}
    _, lines, _ = run()
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} == set(agents.started)
    assert any("the pods start again, restart 1" in line for line in lines)
    assert len(cluster.made) == 1, "the JobSet restarts, it is not made anew"


def test_fatal_failure_is_not_repeated_and_says_why(run, cluster, agents, name):
    agents.plan = {(0, 1): "config", (0, 0): Agents.until_stopped}
    lines = []
    with pytest.raises(JobFailed) as caught:
        run(lines)
    assert caught.value.category == "config"
    assert str(caught.value).startswith(
        "sft failed: node 1 (h): config on purpose\nJobSet: " + name
    )
    assert not any("restart 1" in line for line in lines)
    assert nothing_is_left(cluster)


def test_pod_out_of_memory_is_left_to_the_pipeline(run, cluster, agents):
    lines = []
    killed = lambda pod: wait_for(lambda: len(lines) > 1) and -9  # noqa: E731
    agents.plan = {(0, 0): killed, "all": Agents.until_stopped}
    with pytest.raises(JobFailed, match=r"node 0 was killed for lack of memory") as caught:
        run(lines)
    assert caught.value.category == "oom"
    assert nothing_is_left(cluster)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_pipeline_deletes_its_jobset_and_waits_for_the_pods(
    run, cluster, agents, monkeypatch, stop
):
    stopped = []

    def works(pod):
        pod.stop.wait(20)
        time.sleep(0.3)  # stores a checkpoint
        stopped.append(pod.name)
        return 75

    agents.plan = {"all": works}

    def interrupt(line):
        if line.startswith("agent"):
            raise stop("somebody cancelled")

    with pytest.raises(stop):
        run(type("Lines", (list,), {"append": lambda self, line: interrupt(line)})())
    assert len(stopped) == 2
    assert nothing_is_left(cluster)


def test_pipeline_that_is_started_again_joins_its_jobset(in_background, cluster, agents, run):
    go_on = threading.Event()

    def works(pod):
        go_on.wait(20)
        return agents.work(pod)

    agents.plan = {"all": works}
    first = in_background()  # a pipeline that is killed leaves its JobSet: here it just goes on
    wait_for(lambda: len([p for p in cluster.pods.values() if p.log]) == 2)
    second = in_background()
    wait_for(lambda: any("started earlier" in line for line in second["lines"]))
    go_on.set()
    for pipeline in (first, second):
        pipeline["thread"].join(20)
        assert pipeline["outcomes"]
    assert len(cluster.made) == 1
    assert nothing_is_left(cluster)


def test_jobset_that_another_pipeline_deleted_is_made_anew(in_background, cluster, agents, name):
    agents.plan = {"all": Agents.until_stopped}
    pipeline = in_background()
    wait_for(lambda: [p for p in cluster.pods.values() if p.log])
    agents.plan = {}
    cluster.delete(name)
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]
    assert len(cluster.made) == 2
    assert any("somebody else deleted" in line for line in pipeline["lines"])


def test_foreign_jobset_of_the_same_name_is_not_touched(run, cluster, name):
    foreign = {"metadata": {"name": name, "labels": {}}, "spec": {"suspend": True}}
    cluster.create(foreign)
    with pytest.raises(ConfigError, match="not of this pipeline"):
        run()
    assert name in cluster.jobsets
