"""Real training as Slurm jobs: two nodes end in the loss of one."""

import json
import os

import pytest

from rlhf_core.jobs.launchers import SlurmLauncher
from tasks.launchers import Launch
from tasks.launchers.slurm import Slurm
from tests.cluster.slurm_cluster import interpreter, slurm  # noqa: F401
from tests.faults.stage import Place, make_job

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def train(slurm, inputs, tmp_path, monkeypatch):  # noqa: F811
    """Runs SFT and PPO as one Slurm job; returns the losses of both."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(nodes, ranks):
        folder = tmp_path / f"{nodes}x{ranks}"
        place = Place(inputs[0], folder)
        placement = {"nodes": nodes, "ranks": ranks, "strategy": "zero2", "device": "cpu"}
        jobs = [
            make_job(inputs[1], "sft", placement, max_steps=4),
            make_job(inputs[1], "ppo", placement, steps=1, ppo_epochs=1),
        ]
        monkeypatch.setenv("RLHF_HOME", str(folder / "home"))
        settings = SlurmLauncher(
            folder=str(folder / "out"), poll_seconds=1.0,
            python=str(interpreter(folder, "tasks.launchers.node_agent")),
        )  # fmt: skip
        folders = {folder / job.algorithm: job for job in jobs}
        progress = []
        launch = Launch("sft", folders, place.url, folder / "log.txt")
        outcomes = Slurm(settings).run(launch, print, progress.append)
        assert any(line.get("step") for line in progress)
        slurm.wait(lambda: not slurm.processes())
        files = [place.store.read_bytes(x.artifact, "metrics.jsonl") for x in outcomes]
        lines = [[json.loads(line) for line in file.splitlines()] for file in files]
        return [[line.get("loss", line.get("value_loss")) for line in each] for each in lines]

    return run


@pytest.mark.timeout(1500)
def test_two_nodes_end_in_the_loss_of_one(train):
    assert os.environ["SLURM_CONF"]
    one, two = train(1, 4), train(2, 2)
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
