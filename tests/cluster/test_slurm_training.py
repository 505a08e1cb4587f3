"""Real training as Slurm jobs: two nodes end in the loss of one."""

import json

import pytest

from rlhf_core.jobs.launchers import SlurmLauncher
from tasks.launchers import Launch
from tasks.launchers.slurm import Slurm
from tests.cluster.slurm_cluster import interpreter, slurm  # noqa: F401
from tests.faults.stage import Place, make_job

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.timeout(1500)
def test_two_nodes_end_in_the_loss_of_one(slurm, inputs, tmp_path, monkeypatch):  # noqa: F811
    """SFT and PPO as one Slurm job, and on one machine without Slurm."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))

    def jobs(nodes, ranks):
        placement = {"nodes": nodes, "ranks": ranks, "strategy": "zero2", "device": "cpu"}
        return [
            make_job(inputs[1], "sft", placement, max_steps=4),
            make_job(inputs[1], "ppo", placement, steps=1, ppo_epochs=1),
        ]

    alone = Place(inputs[0], tmp_path / "alone")
    alone.run(jobs(1, 4))
    wanted = [losses(alone, alone.result(job).digest) for job in jobs(1, 4)]

    place = Place(inputs[0], tmp_path / "slurm")
    settings = SlurmLauncher(
        folder=str(tmp_path / "out"), poll_seconds=0.5,
        python=str(interpreter(tmp_path, "tasks.launchers.node_agent")),
    )  # fmt: skip
    folders = {tmp_path / job.algorithm: job for job in jobs(2, 2)}
    progress = []
    launch = Launch("sft", folders, place.url, tmp_path / "log.txt")
    outcomes = Slurm(settings).run(launch, print, progress.append)
    assert any(line.get("step") for line in progress)
    slurm.wait(lambda: not slurm.processes())
    for outcome, want in zip(outcomes, wanted, strict=True):
        assert losses(place, outcome.artifact) == pytest.approx(want, rel=1e-5)


def losses(place, digest):
    lines = place.store.read_bytes(digest, "metrics.jsonl").splitlines()
    return [line.get("loss", line.get("value_loss")) for line in map(json.loads, lines)]
