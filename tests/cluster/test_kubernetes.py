"""The kubernetes launcher with real agents and ranks: pods are processes of this machine, behind an
API server of `tests.kubernetes`."""

import _thread
import json
import threading
import time

import pytest

from rlhf_core.jobs.launchers import KubernetesLauncher
from rlhf_core.runtime import launches
from tasks.launchers.base import Launch
from tasks.launchers.kubernetes.launcher import Kubernetes
from tests.faults.stage import Place, make_job
from tests.kubernetes.pods import process
from tests.kubernetes.server import FakeCluster
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]
TWO = {"nodes": 2, "ranks": 1, "strategy": "zero2"}


class System:
    """A cluster and a store, in which pipelines run a job of two nodes."""

    def __init__(self, inputs, folder, monkeypatch):
        self.place, self.folder = Place(inputs[0], folder / "place"), folder
        self.job = make_job(inputs[1], "sft", TWO, max_steps=12)
        self.cluster = FakeCluster(process(folder / "pods", "tests.cluster.agent"))
        monkeypatch.setenv("KUBECONFIG", str(self.cluster.kubeconfig(folder / "kubeconfig")))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        self.lines, self.progress = [], []

    def run(self):
        launch = Launch("sft", {self.folder / "job": self.job}, self.place.url, self.folder / "log")
        settings = KubernetesLauncher(image="rlhf:1", gpus_per_node=0, poll_seconds=0.2)
        made = Kubernetes(settings)
        [outcome] = made.run(launch, self.lines.append, self.progress.append)
        return outcome


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The weights of an undisturbed run, which is looked at on the way."""
    with pytest.MonkeyPatch.context() as patch:
        system = System(inputs, tmp_path_factory.mktemp("whole"), patch)
        outcome = system.run()
        system.cluster.down()
    assert outcome.artifact == system.place.store.stage_result(system.job.key()).digest
    assert not system.cluster.jobsets and not system.cluster.pods
    return system, weight_hashes(system.place.result(system.job))


@pytest.fixture
def system(inputs, tmp_path, monkeypatch):
    made = System(inputs, tmp_path, monkeypatch)
    yield made
    for pod in list(made.cluster.pods.values()):
        pod.killed.set()
    made.cluster.down()


def test_sft_over_two_pods_shows_its_progress(whole):
    system, _ = whole
    steps = [line["step"] for line in system.progress if "step" in line and "loss" in line]
    assert steps[-1] == 12
    said = (system.folder / "log").read_text()
    assert "node 0: " in said and "node 1: " in said


def test_killed_pod_is_replaced_and_the_result_is_the_same(system, whole, monkeypatch):
    mark = system.folder / "mark"
    fault = {"what": "hold", "rank": 0, "update": 8, "at": str(mark), "checkpoint": True}
    once = {**fault, "once": str(system.folder / "once")}
    monkeypatch.setenv("RLHF_TEST_FAULTS", json.dumps([once]))

    def cut_power():
        while not mark.exists():
            time.sleep(0.05)
        system.cluster.kill(next(p for p in system.cluster.pods.values() if p.index == 1))
        mark.unlink()

    threading.Thread(target=cut_power, daemon=True).start()
    system.run()
    assert any("the pods start again, restart 1" in line for line in system.lines)
    assert any("going on from the checkpoint after step" in line for line in system.lines)
    assert weight_hashes(system.place.result(system.job)) == whole[1]
    assert len(system.cluster.made) == 1


def test_cancelled_pipeline_ends_its_ranks_with_a_checkpoint(system, whole, monkeypatch):
    mark = system.folder / "mark"
    fault = {"what": "hold", "rank": 0, "update": 8, "at": str(mark), "checkpoint": True}
    monkeypatch.setenv("RLHF_TEST_FAULTS", json.dumps([fault]))

    def cancel():
        while not mark.exists():
            time.sleep(0.05)
        _thread.interrupt_main()
        while not all(pod.stop.is_set() for pod in list(system.cluster.pods.values())):
            time.sleep(0.05)
        mark.unlink()

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        system.run()
    ends = [
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
        for _, kind, pod in system.cluster.history
        if kind == "DELETED"
    ]
    assert ends == [launches.STOPPED] * 2
    assert not system.cluster.pods and not system.cluster.jobsets
    assert system.place.store.stage_result(system.job.key()) is None
    monkeypatch.delenv("RLHF_TEST_FAULTS")
    system.run()
    assert any("going on from the checkpoint after step" in line for line in system.lines)
    assert weight_hashes(system.place.result(system.job)) == whole[1]
