"""Out of memory: an error of CUDA's allocator, the host's under a limit, the kernel's killer."""

import json
import logging
import os
from pathlib import Path

import pytest

import tasks.launchers.local as local
from rlhf_core.errors import JobFailed
from rlhf_core.jobs import PipelineConfig
from tasks import execute
from tasks.progress import Progress
from tasks.run import Run
from tests.faults.stage import largest_difference, make_job

pytestmark = pytest.mark.slow
LOG = logging.getLogger("test")


@pytest.fixture
def attempts(place, monkeypatch):
    """Runs a job as a task does, one attempt after another; the failures, and the result."""
    monkeypatch.setattr(local, "MODULE", "tests.faults.ranks")
    monkeypatch.setattr(Progress, "_show", lambda *_: None)  # else a Prefect server is started
    monkeypatch.setenv("RLHF_HOME", str(place.folder / "home"))

    def run(job, faults):
        monkeypatch.setenv("RLHF_TEST_FAULTS", json.dumps(faults))
        failures = []
        while len(failures) < 4:
            pipeline = Run(PipelineConfig(), f"run-{len(failures)}", place.store)
            try:
                [result] = execute.run_jobs(pipeline, "sft", {"sft": job}, LOG)
                return failures, result
            except JobFailed as error:
                failures.append(error)
                if error.category != "oom":
                    break
        return failures, None

    return run


@pytest.mark.chaos
def test_cuda_error_is_told_and_retried_with_half_the_micro_batch(
    place, inputs, attempts, undisturbed
):
    job = make_job(inputs, "sft", {"ranks": 2, "strategy": "zero2", "micro_batch_size": 4})
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    fault = {"what": "memory", "error": "OutOfMemoryError", "text": text, "above": 2, "update": 3}
    [failure], result = attempts(job, [fault])
    assert failure.category == "oom"
    message = str(failure)
    assert text in message
    assert "\nPeak of rank " in message
    assert "\nEstimate with micro_batch_size 4: " in message
    assert "next attempt has micro_batch_size 2 instead of 4; the global batch stays" in message
    assert result.key == job.key()
    other, expected = undisturbed["sft"]  # with micro-batches of 2
    found = place.store.get(result.digest)
    assert found.metadata["job"]["resources"]["micro_batch_size"] == 2
    assert largest_difference(place, found, other, expected) < 1e-5
    assert place.store.list_records("memory/") == []


@pytest.mark.chaos  # how much a process needs beside the batch differs by machine and load
def test_real_limit_of_the_hosts_memory(place, inputs, attempts):
    long = inputs | {"sft": inputs["long"]}
    job = make_job(long, "sft", {"micro_batch_size": 32}, batch_size=32, max_steps=2)
    failures, result = attempts(job, [{"what": "limit", "mib": 260, "where": "start"}])
    assert [f.category for f in failures] == ["oom"]
    assert "can't allocate memory" in str(failures[0])
    assert place.store.get(result.digest).metadata["job"]["resources"]["micro_batch_size"] == 16


@pytest.fixture
def small_group():
    """A control group with a memory limit, for the processes that are put into it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        [own] = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
        group = Path("/sys/fs/cgroup/memory") / own.lstrip("/") / f"rlhf-test-{os.getpid()}"
        group.mkdir()
    except (OSError, ValueError):
        pytest.skip("no control group for memory can be made here")
    (group / "memory.limit_in_bytes").write_text(str(1536 * 2**20))
    yield group
    group.rmdir()


@pytest.mark.chaos
def test_rank_ended_by_the_kernel_is_recognised(place, inputs, small_group):
    job = make_job(inputs, "sft", {"ranks": 2})
    grab = {"what": "grab", "rank": 1, "mib": 3000, "update": 3}
    said = place.run(job, [grab], within=small_group)
    assert "FAILED oom: stage failed: rank 1 was killed by the kernel for lack of memory" in said
    assert f"(oom_kill in {small_group}/memory.oom_control rose from 0 to 1)" in said
    assert "\nMain memory at the peak, as last seen: rank 0 " in said
