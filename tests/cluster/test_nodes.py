"""Stages over two nodes, with real ranks that find each other over a network of their own."""

import json
import time

import pytest

from rlhf_core.runtime import launches
from tasks.launchers.outcome import failure
from tests.cluster.conftest import Cluster
from tests.faults.stage import Place, make_job
from tests.rlhf_core.algorithms.stages import weight_hashes

# A busy machine may need many minutes for a start of all ranks; `Cluster.wait` has limits.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3000)]

ONE = {"nodes": 1, "ranks": 4, "strategy": "zero2"}
TWO = {"nodes": 2, "ranks": 2, "strategy": "zero2"}
PPO = {"steps": 2, "ppo_epochs": 1}


def jobs(inputs, place):
    return [
        make_job(inputs[1], "sft", place, max_steps=6),
        make_job(inputs[1], "ppo", place, **PPO),
    ]


def held(cluster, started, file):
    """Wait until a rank is held by a fault; returns the addresses on which each machine listens."""
    while not file.exists():
        assert all(process.poll() is None for process in started), cluster.said()
        time.sleep(0.1)
    return [machine.listening() for machine in cluster.machines[: cluster.nodes]]


def hold(mark, update, **more):
    """A fault: rank 0 says that it is there, and waits for the end of the test's look."""
    return {"what": "hold", "rank": 0, "update": update, "at": str(mark), **more}


@pytest.fixture(scope="module")
def alone(machines, inputs, tmp_path_factory):
    """SFT and PPO on four ranks of one node; addresses on which it listened during PPO."""
    place = Place(inputs[0], tmp_path_factory.mktemp("alone") / "place")
    cluster = Cluster(machines, place)
    mark = place.folder / "mark"
    started = cluster.start(jobs(inputs, ONE), 1, [hold(mark, 7)])
    [listening] = held(cluster, started, mark)
    mark.unlink()
    assert cluster.wait(started) == [launches.DONE], cluster.said()
    return cluster, listening


@pytest.fixture(scope="module")
def both(machines, inputs, tmp_path_factory):
    """The same on two ranks of each of two nodes."""
    place = Place(inputs[0], tmp_path_factory.mktemp("both") / "place")
    cluster = Cluster(machines, place)
    mark = place.folder / "mark"
    started = cluster.start(jobs(inputs, TWO), 2, [hold(mark, 7)])
    listening = held(cluster, started, mark)
    mark.unlink()
    assert cluster.wait(started) == [launches.DONE] * 2, cluster.said()
    return cluster, listening


def metrics(place, job):
    lines = place.store.read_bytes(place.result(job).digest, "metrics.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def test_ranks_of_one_machine_listen_on_loopback_only(alone):
    assert alone[1] == {"127.0.0.1"}


def test_ranks_of_two_machines_listen_on_the_network_between_them_only(both):
    cluster, listening = both
    assert listening == [{machine.address} for machine in cluster.machines]


def test_two_nodes_end_in_the_loss_of_one(alone, both, inputs):
    for job in jobs(inputs, TWO):
        one, two = metrics(alone[0].place, job), metrics(both[0].place, job)
        assert len(one) == len(two) > 1
        for first, second in zip(one, two, strict=True):
            assert second == pytest.approx(first, rel=1e-4, abs=1e-6), job.algorithm
    reports = both[0].reports()
    assert [(n, r.host, r.state) for n, r in reports.items()] == [
        (0, "node0", "done"), (1, "node1", "done"),
    ]  # fmt: skip


def test_launch_goes_on_after_a_node_was_killed(cluster, both, inputs):
    job = jobs(inputs, TWO)[0]
    mark = cluster.folder / "mark"
    started = cluster.start([job], 2, [hold(mark, 4, checkpoint=True)])
    held(cluster, started, mark)
    cluster.machines[1].kill()
    mark.unlink()
    assert cluster.wait(started, 120)[0] == launches.LOST
    error = failure(cluster.place.store, "sft", cluster.launch, cluster.attempt, 2)
    assert (error.category, str(error).splitlines()[0]) == (
        "lost", "sft failed: node 1 (node1) vanished: its agent ended without a word",
    )  # fmt: skip
    assert cluster.place.store.stage_result(job.key()) is None
    assert cluster.run([job]) == [launches.DONE] * 2, cluster.said()
    assert "going on from the checkpoint after step" in cluster.output(0).read_text()
    whole = both[0].place.result(job)
    assert weight_hashes(cluster.place.result(job)) == weight_hashes(whole)


def test_launch_ends_when_the_network_between_its_nodes_is_cut(cluster, inputs):
    """Nothing tells the ranks; they would wait for collective_timeout, half an hour."""
    job = make_job(inputs[1], "sft", TWO | {"stop_timeout": 3}, max_steps=6)
    mark = cluster.folder / "mark"
    started = cluster.start([job], 2, [hold(mark, 3)])
    held(cluster, started, mark)
    with cluster.machines[1].unplugged():
        mark.unlink()
        assert cluster.wait(started, 200) == [launches.LOST] * 2
    error = failure(cluster.place.store, "sft", cluster.launch, cluster.attempt, 2)
    assert error.category == "lost" and "vanished" in str(error)
