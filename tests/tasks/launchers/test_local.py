"""The local launcher with real torchrun and real ranks that do what a test needs."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import DataJob, ImportModelJob, Resources, SFTJob
from tasks.launchers import Launch, LocalTorchrun
from tasks.launchers.command import environment, torchrun_command
from tasks.launchers.local import TORCHRUN

pytestmark = pytest.mark.slow
D = "0" * 64


def sft_job(**resources):
    return SFTJob(model=D, data=D, resources=Resources(ranks=2, **resources))


def launch(tmp_path, store, *jobs):
    folder = tmp_path / "job folder"  # with a space
    folders = [folder] if len(jobs) == 1 else [folder / str(i) for i in range(len(jobs))]
    return Launch("stage", dict(zip(folders, jobs, strict=True)), store.url, folder / "log.txt")


def run(tmp_path, store, *jobs, grace_seconds=20.0):
    lines, progress = [], []
    launched = launch(tmp_path, store, *jobs)
    outcomes = LocalTorchrun(grace_seconds).run(launched, lines.append, progress.append)
    return outcomes, lines, progress


def failure(tmp_path, store, *jobs):
    lines = []
    with pytest.raises(JobFailed) as caught:
        LocalTorchrun().run(launch(tmp_path, store, *jobs), lines.append, lambda line: None)
    return caught.value, lines


def test_job_returns_its_artifact_output_and_progress(tmp_path, store, stub):
    [outcome], lines, progress = run(tmp_path, store, sft_job())
    artifact = store.stage_result(sft_job().key())
    assert (outcome.artifact, outcome.kind) == (artifact.digest, "model")
    assert "stub runs sft" in lines
    assert progress[-1]["step"] == 3
    assert "stub runs sft" in (tmp_path / "job folder/log.txt").read_text()
    assert not (tmp_path / "job folder/scratch").exists()


def test_several_jobs_run_in_one_process(tmp_path, store, stub):
    jobs = [DataJob(model=D, purpose=p) for p in ("sft", "prompts")]
    outcomes, lines, _ = run(tmp_path, store, *jobs)
    assert [o.key for o in outcomes] == [job.key() for job in jobs]
    assert lines.count("stub runs data") == 2


def test_rank_killed_by_sigkill_is_lost_and_named(tmp_path, store, stub):
    stub(sft=["die"])
    error, lines = failure(tmp_path, store, sft_job())
    assert error.category == "lost"
    assert "rank 1 was killed by SIGKILL" in str(error)
    assert str(error).endswith(f"Full log: {tmp_path}/job folder/log.txt")
    assert not any("ChildFailedError" in line or "====" in line for line in lines)
    assert "ChildFailedError" in (tmp_path / "job folder/log.txt").read_text()


def test_error_file_gives_category_and_message(tmp_path, store, stub):
    stub(sft=["oom"])
    error, _ = failure(tmp_path, store, sft_job())
    assert error.category == "oom"
    assert str(error).startswith("stage failed: stub ran into oom\n")


def test_real_reason_wins_over_an_earlier_lost_connection(tmp_path, store, stub):
    stub(sft=["lost_peer"])
    error, _ = failure(tmp_path, store, sft_job())
    assert (error.category, "row 7 has no text" in str(error)) == ("data", True)


def test_unexpected_exception_is_internal(tmp_path, store, stub):
    stub(sft=["bug"])
    error, _ = failure(tmp_path, store, sft_job())
    assert error.category == "internal"
    assert "ZeroDivisionError: stub divided" in str(error)


def test_plain_process_that_dies_is_lost(tmp_path, store, stub):
    pids = stub(import_model=["sleep"])
    thread = threading.Thread(target=kill_one, args=(pids, 1))
    thread.start()
    error, _ = failure(tmp_path, store, ImportModelJob())
    thread.join()
    assert error.category == "lost"
    assert "the process was killed by SIGKILL" in str(error)


def test_exit_without_a_reason_is_told_with_its_code(tmp_path, store, stub):
    stub(import_model=["silent"])
    error, _ = failure(tmp_path, store, ImportModelJob())
    assert "exit code 3" in str(error)


def wait_for(pids: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(found := list(pids.iterdir())) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(path.name) for path in found]


def kill_one(pids, count):
    os.kill(wait_for(pids, count)[0], signal.SIGKILL)


def gone(pids: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


PARENT = """
import signal, sys
from pathlib import Path
import tasks.launchers.local as local
from tasks.launchers import Launch, LocalTorchrun
from rlhf_core.jobs import Resources, SFTJob

local.MODULE = "rlhf_stub.__main__"
def stop(number, frame): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
folder = Path(sys.argv[1])
job = SFTJob(model="0" * 64, data="0" * 64, resources=Resources(ranks=2))
LocalTorchrun(grace_seconds=float(sys.argv[3])).run(
    Launch("sft", {folder: job}, sys.argv[2], folder / "log.txt"), print, print)
"""


@pytest.fixture
def parent(tmp_path, store, stub):
    """A process that runs the launcher, with two ranks that sleep; ended afterwards."""
    started = []

    def start(behaviour, grace_seconds):
        pids = stub(sft=[behaviour])
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PARENT), tmp_path / "job", store.url,
             grace_seconds],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        started.append(process)
        ranks = wait_for(pids, 2)
        torchrun = psutil.Process(ranks[0]).ppid()
        server = psutil.Process(torchrun).ppid()
        assert psutil.Process(server).ppid() == process.pid
        return process, [*ranks, server, torchrun]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_cancel_ends_every_process(parent):
    process, children = parent("sleep", "20")
    listening = [c.laddr.ip for pid in children for c in psutil.Process(pid).net_connections()
                 if c.status == psutil.CONN_LISTEN]  # fmt: skip
    assert listening and set(listening) == {"127.0.0.1"}, "open to other machines"
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert gone(children, 10)


def test_cancel_ends_ranks_that_ignore_sigterm(parent):
    process, children = parent("stubborn", "2")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert gone(children, 10)


def test_no_rank_outlives_a_killed_orchestrator(parent):
    process, children = parent("sleep", "20")
    process.kill()
    process.wait()
    assert gone(children, 10)


def test_no_rank_outlives_a_killed_torchrun(parent):
    process, children = parent("stubborn", "20")
    os.kill(children[-1], signal.SIGKILL)
    process.wait(60)
    assert gone(children, 10)


def test_ranks_of_gpus_are_processes_of_their_own():
    line = torchrun_command("rlhf_core", [sft_job()], [Path("job.json")], ["0", "1"])
    assert line[1:3] == ["-m", "rlhf_core.runtime.rendezvous"]
    assert line[line.index("--rdzv-endpoint") + 1] == "127.0.0.1"
    assert line[line.index("--nproc-per-node") + 1] == "2"


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr("tasks.launchers.command.cpu_cores", lambda: 8)
    assert environment([sft_job()], "file:///s")["OMP_NUM_THREADS"] == "4"
    assert environment([sft_job(threads=3)], "file:///s")["OMP_NUM_THREADS"] == "3"
    assert environment([ImportModelJob()], "file:///s")["OMP_NUM_THREADS"] == "8"


def test_environment_names_the_store_and_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    found = environment([sft_job()], "s3://b/p")
    assert (found["RLHF_STORE"], found["WANDB_MODE"]) == ("s3://b/p", "online")
    monkeypatch.delenv("WANDB_MODE")
    assert environment([sft_job()], "s3://b/p")["WANDB_MODE"] == "disabled"


def test_job_file_is_what_the_ranks_read(tmp_path, store, stub):
    run(tmp_path, store, sft_job())
    job = json.loads((tmp_path / "job folder/job.json").read_text())
    assert SFTJob.model_validate(job) == sft_job()


@pytest.mark.parametrize(
    ("line", "own"),
    [
        (
            "W1130 12:25:53.682 30054 torch/multiprocessing/spawn.py:165] Terminating process 3",
            True,
        ),
        ("E1130 12:25:53.682 30054 torch/distributed/elastic/api.py:836] failed (exitcode", True),
        ("[W1130 12:25:53.682 torch/_utils.py:1] warned", True),
        ("WARNING: no evaluation is better than that of the untrained model", False),
    ],
)
def test_torchruns_own_lines_are_not_for_users(line, own):
    assert (TORCHRUN.match(line) is not None) == own
