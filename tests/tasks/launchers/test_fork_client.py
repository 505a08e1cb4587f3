"""Stages on CPUs are forked from one process that has imported what they need."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import DataJob, Resources, SFTJob
from tasks.launchers import Launch, LocalTorchrun, fork_client, local

pytestmark = pytest.mark.slow
D = "0" * 64


@pytest.fixture
def fresh():
    """No server runs when the test begins."""
    fork_client.close()


@pytest.fixture(scope="module", autouse=True)
def none_is_left():
    fork_client.close()
    yield
    fork_client.close()
    assert not [p for p in psutil.Process().children() if p.name() == "rlhf forkserver"]


@pytest.fixture
def launch(tmp_path, store, stub):
    """Runs a job that writes down what it is; returns that, of rank 0."""
    stub(sft=["forked"], data=["forked"])

    def run(job, name="job"):
        folder = tmp_path / name
        made = Launch("stage", {folder: job}, store.url, folder / "log.txt")
        LocalTorchrun().run(made, lambda line: None, lambda line: None)
        return json.loads((folder / "forked-0.json").read_text())

    return run


def sft_job(seed=0, ranks=2, threads=1):
    return SFTJob(model=D, data=D, seed=seed, resources=Resources(ranks=ranks, threads=threads))


def running():
    [found] = [p for p in psutil.Process().children() if p.name() == "rlhf forkserver"]
    return found


def test_every_stage_comes_from_the_one_that_has_imported(launch):
    agents = launch(sft_job(), "first"), launch(sft_job(seed=1, ranks=1, threads=2), "second")
    plain = launch(DataJob(model=D, purpose="sft"), "third")
    at = running().pid
    for found in agents:
        assert found["parents"][1:3] == [at, os.getpid()]
    assert plain["parents"][:2] == [at, os.getpid()]
    assert {found["preloaded_by"] for found in (*agents, plain)} == {at}


def test_server_imports_before_the_first_stage(fresh, launch):
    LocalTorchrun().prepare()
    LocalTorchrun().prepare()  # there is one
    found = launch(sft_job(), "first")
    assert found["preloaded"][:2] == [0, 1]
    LocalTorchrun().prepare()
    assert running().pid == found["parents"][1]


def test_what_every_training_stage_needs_is_imported_without_a_job():
    code = (
        "import sys; from rlhf_core.runtime.rank import preload; preload([]); "
        "wanted = {'torch', 'rlhf_core.runtime.torchrun', 'transformers.modeling_utils'}; "
        "print(wanted <= {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_server_that_imports_ends_at_once(fresh):
    LocalTorchrun().prepare()
    began = time.monotonic()
    fork_client.close()
    assert time.monotonic() - began < 3, "its imports take longer"


def test_each_stage_has_its_own_threads_and_environment(launch, monkeypatch):
    for number, threads in enumerate((1, 2, 1)):
        monkeypatch.setenv("SEEN", str(number))
        found = launch(sft_job(seed=number, threads=threads), str(number))
        assert (found["threads"], found["SEEN"]) == (threads, str(number))


def test_what_libraries_read_when_imported_needs_another_server(launch, monkeypatch, tmp_path):
    first = launch(sft_job(), "first")
    monkeypatch.setenv("TRANSFORMERS_CACHE_FOR_TESTS", "elsewhere")
    second = launch(sft_job(seed=1), "second")
    monkeypatch.chdir(tmp_path)
    third = launch(sft_job(seed=2), "third")
    assert len({found["parents"][1] for found in (first, second, third)}) == 3
    assert not psutil.pid_exists(first["parents"][1])


def test_use_of_forked_ranks_is_shown(stub, store, tmp_path, monkeypatch):
    """In /proc they have the command line and the environment of the fork_client."""
    stub(sft=["wait:1.5"])
    monkeypatch.setattr(local, "USAGE_SECONDS", 0.1)
    monkeypatch.setattr(local, "REFRESH_SECONDS", 0.1)
    folder, seen = tmp_path / "job", []
    made = Launch("stage", {folder: sft_job()}, store.url, folder / "log.txt")
    LocalTorchrun().run(made, lambda line: None, seen.append)
    lines = [line for found in seen for line in found.get("usage", "").splitlines()]
    assert {line.split("|")[1].strip() for line in lines} >= {"0", "1"}


def test_killed_idle_server_is_replaced(launch, monkeypatch):
    first = launch(sft_job(), "first")["parents"][1]
    os.kill(first, signal.SIGTERM)  # the stages answer that, not it
    time.sleep(0.2)
    assert running().pid == first
    os.kill(first, signal.SIGKILL)
    assert launch(sft_job(seed=1), "second")["parents"][1] != first


def test_idle_server_exits(monkeypatch):
    import socket

    from rlhf_core.runtime import fork_server as process

    monkeypatch.setattr(process, "IDLE_SECONDS", 0.2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process.ForkServer(theirs).serve()  # returns


def test_killed_server_ends_its_stage_and_the_next_has_another(launch, stub, tmp_path, store):
    pids = stub(sft=["sleep", "forked"])
    folder = tmp_path / "job"
    made = Launch("stage", {folder: sft_job()}, store.url, folder / "log.txt")
    failures = []

    def run():
        try:
            LocalTorchrun().run(made, lambda line: None, lambda line: None)
        except JobFailed as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while len(ranks := [int(p.name) for p in pids.iterdir()]) < 2:
        time.sleep(0.05)
    running().kill()
    thread.join(20)
    assert [f.category for f in failures] == ["preempted"], failures
    assert not any(psutil.pid_exists(rank) for rank in ranks)
    assert launch(sft_job(seed=1), "job-2")["SEEN"] is None


def test_stop_while_the_server_imports_leaves_no_stage(fresh, stub, store, tmp_path, monkeypatch):
    """The request is there already, and nobody waits for it any more."""
    pids = stub(sft=["sleep"], data=["forked"])

    def stopped(*arguments):
        raise KeyboardInterrupt

    def run(folder, job):
        made = Launch("stage", {folder: job}, store.url, folder / "log.txt")
        LocalTorchrun().run(made, lambda line: None, lambda line: None)

    with monkeypatch.context() as patch:
        patch.setattr(fork_client, "_readable", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "job", sft_job())
    run(tmp_path / "next", DataJob(model=D, purpose="sft"))  # requests are taken one by one
    at = running()
    assert json.loads((tmp_path / "next/forked-0.json").read_text())["parents"][0] == at.pid
    deadline = time.monotonic() + 20
    while at.children():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(pids.iterdir()) == []
