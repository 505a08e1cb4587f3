"""A cluster of tests.kubernetes, and pods that say and do what a test wants."""

import threading
import time

import pytest

from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.jobs.launchers import KubernetesLauncher
from rlhf_core.runtime.launches import NodeReport, exit_code, launch_id, read_jobs, write_report
from rlhf_core.store import open_store
from tasks.launchers import waits
from tasks.launchers.base import Launch
from tasks.launchers.kubernetes import api, launcher, logs, pods, starting
from tests.kubernetes.server import FakeCluster

D = "0" * 64
JOB = SFTJob(model=D, data=D, resources=Resources(nodes=2, stop_timeout=1))


class Agents:
    """Stands for the agents in the pods. Each does what the plan says, by (restart, node); a pod
    without an entry does its work.

    Plan: a category of a failure, or a function of the pod that returns an exit code.
    """

    def __init__(self, store):
        self.store, self.plan, self.started = store, {}, []

    def __call__(self, pod):
        launch, attempt, node = self.options(pod)
        restart = int(attempt.rpartition("-")[2])
        pod.print(f"agent {node} of {attempt}")
        self.started.append((restart, node))
        does = self.plan.get((restart, node), self.plan.get("all"))
        if does is None:
            return self.work(pod)
        if callable(does):
            return does(pod)
        text = f"{does} on purpose"
        report = NodeReport(node=node, host="h", state="failed", category=does, text=text)
        write_report(self.store, launch, attempt, report)
        return exit_code(does)

    def work(self, pod):
        """Leave the results in the store."""
        launch, _, node = self.options(pod)
        if node == 0:
            pod.print('rlhf-progress {"step": 3, "total": 3, "loss": 1.5}')
            for job in read_jobs(self.store, launch)[1]:
                made = self.store.publish_derived(kind="model", files={"x": job.key().encode()})
                self.store.commit_stage(job.key(), made, {})
        return 0

    @staticmethod
    def options(pod):
        """Launch, attempt and node of an agent's command."""
        found = dict(zip(pod.command[3::2], pod.command[4::2], strict=True))
        return found["--launch"], found["--attempt"], int(found["--node-rank"])

    @staticmethod
    def until_stopped(pod):
        """Works until SIGTERM, then stores a checkpoint; ends with 137 at SIGKILL."""
        while not pod.stop.wait(0.02):
            if pod.killed.is_set():
                return 137
        return 75


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def agents(store):
    return Agents(store)


@pytest.fixture
def cluster(agents, tmp_path, monkeypatch):
    made = FakeCluster(agents)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setattr(api, "RETRY_SECONDS", 0.05)
    for module in (logs, pods):
        monkeypatch.setattr(module, "REOPEN_SECONDS", 0.05)
    monkeypatch.setattr(launcher, "DELETE_POLL_SECONDS", 0.02)
    monkeypatch.setattr(launcher, "LOG_SECONDS", 2.0)
    monkeypatch.setattr(waits, "FIRST_SECONDS", 0.3)
    monkeypatch.setattr(starting, "NO_PODS_SECONDS", 0.0)
    yield made
    made.down()


@pytest.fixture
def run(cluster, store, tmp_path):
    """Runs the job as a pipeline does; returns (outcomes, lines, progress)."""

    def start(lines=None, progress=None, **settings):
        lines = [] if lines is None else lines
        progress = [] if progress is None else progress
        given = {"image": "rlhf:1", "max_restarts": 2, "poll_seconds": 0.1, **settings}
        launch = Launch("sft", {tmp_path / "job": JOB}, store.url, tmp_path / "log.txt")
        fixed = KubernetesLauncher.model_construct(**KubernetesLauncher(image="i").__dict__ | given)
        made = launcher.Kubernetes(fixed)  # not checked, so that timeouts may be short
        return made.run(launch, lines.append, progress.append), lines, progress

    return start


@pytest.fixture
def name():
    from tasks.launchers.kubernetes.manifest import name_of

    return name_of("sft", launch_id([JOB]))


def wait_for(what, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def nothing_is_left(cluster):
    return not cluster.jobsets and not cluster.pods


@pytest.fixture
def in_background(run):
    """Starts a pipeline in a thread; returns what it has given when it ends."""

    def start(**settings):
        ended = {"lines": [], "progress": []}

        def pipeline():
            try:
                ended["outcomes"], _, _ = run(ended["lines"], ended["progress"], **settings)
            except BaseException as error:
                ended["error"] = error

        ended["thread"] = threading.Thread(target=pipeline, daemon=True)
        ended["thread"].start()
        return ended

    return start
