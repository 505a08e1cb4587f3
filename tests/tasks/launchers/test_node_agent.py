"""The agent of a node, on this machine alone, with real torchrun and the stub's ranks."""

import os
import signal
import threading

import pytest

from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.runtime import launches
from tasks.launchers import node_agent
from tasks.launchers.outcome import failure
from tasks.launchers.remote_output import RemoteOutput

pytestmark = pytest.mark.slow
JOB = SFTJob(model="0" * 64, data="0" * 64, resources=Resources(ranks=2))


def run_agent(store, tmp_path, attempt="7-0", job=JOB, url=""):
    found = launches.write_jobs(store, "sft", [job])
    options = {
        "--store": url or store.url, "--launch": found, "--attempt": attempt, "--nodes": "1",
        "--node-rank": "0", "--rendezvous": "127.0.0.1:0", "--scratch": str(tmp_path / "scratch"),
    }  # fmt: skip
    return found, node_agent.main([word for pair in options.items() for word in pair])


def test_agent_prints_output_and_progress_and_reports_to_the_store(tmp_path, store, stub, capfd):
    found, code = run_agent(store, tmp_path)
    assert code == launches.DONE
    assert store.stage_result(JOB.key()).kind == "model"
    output, progress = [], []
    for line in capfd.readouterr().out.splitlines(keepends=True):
        RemoteOutput(output.append, progress.append)(line)
    assert "stub runs sft" in output
    assert [line["loss"] for line in progress if "step" in line][-1] == 1.0
    assert launches.read_reports(store, found, "7-0", 1)[0].state == "done"
    launches.forget(store, found)
    assert store.list_records("launches/") == []


def test_exit_code_and_report_tell_the_category(tmp_path, store, stub):
    stub(sft=["die"])
    found, ended = run_agent(store, tmp_path)
    error = failure(store, "sft", found, "7-0", 1, where="Job: 7")
    assert (ended, error.category) == (launches.LOST, "lost")
    assert str(error).startswith("sft failed: rank 1 was killed by SIGKILL")
    assert str(error).endswith("\nJob: 7")


def test_agent_that_gets_sigterm_ends_its_ranks(tmp_path, store, stub):
    pids = stub(sft=["sleep"])

    def kill():
        while len(list(pids.iterdir())) < 2:
            threading.Event().wait(0.05)
        for _ in range(3):  # Slurm sends more than one
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill).start()
    found, code = run_agent(store, tmp_path)
    assert code == launches.STOPPED
    [report] = launches.read_reports(store, found, "7-0", 1).values()
    assert (report.category, report.weight) == ("preempted", launches.SIGNAL)
    assert not any(os.path.exists(f"/proc/{path.name}") for path in pids.iterdir())


def test_a_job_of_more_nodes_is_refused(tmp_path, store, stub):
    job = JOB.model_copy(update={"resources": Resources(nodes=2)})
    found, code = run_agent(store, tmp_path, job=job)
    [report] = launches.read_reports(store, found, "7-0", 1).values()
    assert code == launches.ENDED
    assert report.text.startswith("sft.resources.nodes is 2, but this launch has 1 machine;")


def test_a_store_that_cannot_be_opened_is_told(tmp_path, store, capfd):
    assert run_agent(store, tmp_path, url="ftp-of-a-kind://x")[1] == launches.ENDED
    assert capfd.readouterr().out.startswith("ERROR (config): ")
