"""The slurm launcher on a real Slurm: three nodes, and agents that count steps without ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.jobs.launchers import SlurmLauncher
from rlhf_core.runtime.launches import launch_id
from rlhf_core.store import open_store
from tasks.launchers import Launch, waits
from tasks.launchers.slurm import Slurm
from tasks.launchers.slurm.launcher import job_name
from tests.cluster.slurm_cluster import interpreter, slurm  # noqa: F401
from tests.rlhf_core.torchrun import HANGS, ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3 * HANGS)]

FOREVER = 100_000
STAGE = """
import json, os, signal, sys
from pathlib import Path
from rlhf_core.jobs import parse_job
from rlhf_core.jobs.launchers import SlurmLauncher
from tasks.launchers import Launch
from tasks.launchers.slurm import Slurm
settings, job, store, folder = sys.argv[1:]
launch = Launch("sft", {Path(folder) / "job": parse_job(job.encode())}, store, Path(folder) / "log")
Slurm(SlurmLauncher.model_validate_json(settings)).run(launch, print, print)
"""


class Stage:
    """One launch with its own folder and stub."""

    def __init__(self, cluster, folder, **settings):
        self.cluster, self.folder = cluster, folder
        self.job = SFTJob(
            model="0" * 64, data="1" * 64, seed=abs(hash(str(folder))) % 10**6,
            resources=Resources(nodes=settings.pop("nodes", 2), device="cpu"),
        )  # fmt: skip
        self.settings = SlurmLauncher(
            folder=str(folder / "out"), python=str(interpreter(folder, "tests.cluster.stub_agent")),
            poll_seconds=0.3, setup=(f"export STUB={folder}",), **settings,
        )  # fmt: skip
        self.store = open_store(f"file://{folder / 'store'}")
        self.lines, self.progress, self.error = [], [], None

    def steps(self, count):
        (self.folder / "steps").write_text(str(count))

    def number(self, name):
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):
            return 0

    @property
    def launch(self):
        jobs = {self.folder / "job": self.job}
        return Launch("sft", jobs, self.store.url, self.folder / "log.txt")

    def run(self):
        return Slurm(self.settings).run(self.launch, self.lines.append, self.progress.append)

    def start(self):
        """Run it in a thread; `end` has what came of it."""

        def target():
            try:
                self.outcome = self.run()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=target, daemon=True)
        self.thread.start()
        return self

    def end(self):
        self.thread.join(HANGS)
        assert not self.thread.is_alive(), self.lines
        if self.error is not None:
            raise self.error
        return self.result()

    def running(self, starts=1):
        """Wait until the agents run for the nth time, and are at work."""
        self.cluster.wait(lambda: self.error or self.number("starts") >= starts)
        assert self.error is None, self.error
        time.sleep(0.5)

    def jobs(self):
        """Ids of its own jobs that have not ended; that of another test may still be ending."""
        name = job_name("sft", launch_id([self.job]), self.store.url)
        return self.cluster(f"squeue -h -n {name} -o %i").split()

    def result(self):
        """Steps of the result; no process is left."""
        self.cluster.wait(lambda: not self.cluster.processes())
        artifact = self.store.stage_result(self.job.key())
        return None if artifact is None else artifact.metadata["steps"]

    def process(self):
        """A pipeline's process that runs the stage."""
        arguments = [
            self.settings.model_dump_json(), self.job.model_dump_json(), self.store.url,
            str(self.folder),
        ]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", STAGE, *arguments], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


@pytest.fixture
def stage(slurm, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(waits, "FIRST_SECONDS", 1.0)
    made = []

    def make(**settings):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Stage(slurm, folder, **settings))
        return made[-1]

    yield make
    slurm("scancel --state=PENDING; scancel --state=RUNNING")
    slurm.wait(lambda: not slurm.job_states())


def test_job_runs_on_two_nodes_with_output_and_progress(stage):
    one = stage()
    one.steps(20)
    one.run()
    assert one.result() == 20 and one.number("starts") == 1
    assert any(line.startswith("starting at step 0, attempt ") for line in one.lines)
    assert {"step": 20, "total": 20} in one.progress
    assert "rlhf: job" in (one.folder / "log.txt").read_text()


def test_cancelled_pipeline_leaves_no_job_and_no_process(stage):
    one = stage()
    one.steps(FOREVER)
    process = one.process()
    one.running()
    process.send_signal(signal.SIGINT)
    process.wait(HANGS)
    assert not one.jobs() and one.result() is None
    assert one.number("checkpoint") > 0


def test_scancel_by_a_person_fails_the_stage(stage):
    one = stage()
    one.steps(FOREVER)
    one.start().running()
    one.cluster(f"scancel {one.jobs()[0]}")
    with pytest.raises(JobFailed, match="scancel") as failed:
        one.end()
    assert failed.value.category == "cancelled" and one.result() is None


def test_job_outlives_its_pipeline_and_is_joined(stage):
    one = stage()
    one.steps(FOREVER)
    process = one.process()
    one.running()
    process.kill()
    process.wait()
    [job] = one.jobs()
    one.start()
    one.cluster.wait(lambda: any(f"joining Slurm job {job}" in line for line in one.lines))
    one.steps(one.number("starts") and 30)
    assert one.end() and one.number("starts") == 1


def test_preempted_job_goes_on_from_its_checkpoint(stage):
    one = stage(nodes=3)
    one.steps(FOREVER)
    one.start().running()
    urgent = one.cluster(
        "sbatch --parsable -p urgent -N3 --exclusive -o /dev/null --wrap 'sleep 1'"
    ).strip()
    one.cluster.wait(lambda: one.number("checkpoint") > 0)
    saved = one.number("checkpoint")
    one.steps(saved + 15)
    assert one.end() == saved + 15 and one.number("starts") == 2
    assert urgent and any("was requeued" in line for line in one.lines)
    assert f"starting at step {saved}" in (one.folder / "log.txt").read_text()


def test_requeue_by_hand_goes_on_from_the_checkpoint(stage):
    one = stage()
    one.steps(FOREVER)
    one.start().running()
    one.cluster(f"scontrol requeue {one.jobs()[0]}")
    one.cluster.wait(lambda: one.number("checkpoint") > 0)
    one.steps(one.number("checkpoint") + 10)
    assert one.end() == one.number("checkpoint") + 10 and one.number("starts") == 2


def test_killed_node_leads_to_a_requeue(stage):
    one = stage(nodes=2)
    one.steps(FOREVER)
    one.start().running()
    names = one.cluster(f"scontrol show hostnames $(squeue -h -j {one.jobs()[0]} -o %N)").split()
    try:
        one.cluster.kill_node(names[1])
        one.running(starts=2)
        last = one.number("checkpoint") + 50  # the other node has saved one
        one.steps(last)
        assert one.end() == last and one.number("starts") == 2
    finally:
        one.cluster.start_node(names[1])
        one.cluster.wait(lambda: len(one.cluster("sinfo -h -t idle -N -p main -o %N").split()) == 3)


def test_time_limit_is_a_checkpoint_and_a_continuation(stage):
    one = stage(time_limit="10", notice=60)
    one.steps(FOREVER)
    one.start().running()
    # Slurm's notice would come after nine minutes; this is the same signal to the same process
    one.cluster(f"scancel --signal=USR1 --batch {one.jobs()[0]}")
    one.cluster.wait(lambda: one.number("checkpoint") > 0)
    saved = one.number("checkpoint")
    one.steps(saved + 10)
    assert one.end() == saved + 10 and one.number("starts") == 2
    assert "the time limit is near" in "\n".join(one.lines)


def test_interruptions_are_bounded(stage):
    one = stage(max_restarts=0)
    one.steps(FOREVER)
    one.start().running()
    one.cluster(f"scontrol requeue {one.jobs()[0]}")
    with pytest.raises(JobFailed, match="interrupted more than"):
        one.end()
    assert one.result() is None and not one.jobs()


def test_category_of_a_failure_comes_from_the_nodes(stage):
    one = stage()
    one.steps(FOREVER)
    one.start().running()
    (one.folder / "fail").write_text("nonfinite")
    with pytest.raises(JobFailed, match="as planned") as failed:
        one.end()
    assert failed.value.category == "nonfinite"


def test_waiting_job_tells_reason_and_place(stage):
    one, two = stage(nodes=3, exclusive=True), stage(nodes=3, exclusive=True)
    one.steps(FOREVER)
    one.start().running()
    two.steps(1)
    two.start()
    one.cluster.wait(lambda: any("waiting" in p and p["waiting"] for p in two.progress))
    [told] = [p["waiting"] for p in two.progress if p.get("waiting")][:1]
    assert "1st in the queue of main" in told and told.split(",")[0] in ("Resources", "Priority")
    one.steps(1)
    one.end(), two.end()
    assert {"waiting": None} in two.progress


def test_settings_that_slurm_refuses_are_named(stage):
    one = stage(partition="nosuch")
    with pytest.raises(Exception, match="invalid partition") as failed:
        one.run()
    assert failed.value.category == "config" and "Traceback" not in str(failed.value)


def test_job_that_can_never_start_fails_at_once(stage):
    one = stage(time_limit="9:00:00")
    with pytest.raises(JobFailed, match="time_limit exceeds") as failed:
        one.run()
    assert failed.value.category == "config" and not one.jobs()


def test_job_record_is_left_out_of_the_store_when_done(stage):
    one = stage(nodes=1)
    one.steps(1)
    one.run()
    assert one.store.list_records("launches/") == []
    assert json.loads(one.settings.model_dump_json())["type"] == "slurm"
