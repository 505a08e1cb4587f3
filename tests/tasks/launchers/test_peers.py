"""Agents that watch each other, over loopback."""

import threading

import pytest

from rlhf_core.errors import ConfigError, JobFailed
from tasks.launchers import network, peers
from tasks.launchers.network import resolved, way_to
from tasks.launchers.peers import Peers


@pytest.fixture
def three(monkeypatch):
    """Three nodes that have found each other, and who of them gave up."""
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.05)
    gave_up = [threading.Event() for _ in range(3)]
    made = [Peers(rank, event.set) for rank, event in enumerate(gave_up)]
    port = made[0].serve("127.0.0.1")
    for each in made[1:]:
        each.join("127.0.0.1", port)
    made[0].wait(3)
    yield made, gave_up
    for each in made:
        each.close(done=True)


def test_nodes_that_say_good_bye_are_not_lost(three):
    made, gave_up = three
    for each in reversed(made):
        each.close(done=True)
    assert not any(event.wait(0.1) for event in gave_up)
    assert [each.lost for each in made] == [None] * 3


def test_a_node_that_ends_without_a_word_is_lost_to_node_0(three):
    made, gave_up = three
    made[2].close(done=False)
    assert gave_up[0].wait(5) and made[0].lost == 2
    made[0].close(done=False)
    assert gave_up[1].wait(5) and made[1].lost == 0
    assert not gave_up[2].is_set(), "it has closed"


def test_a_node_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(peers, "JOIN_SECONDS", 0.1)
    first = Peers(0, lambda: None)
    port = first.serve("127.0.0.1")
    Peers(2, lambda: None).join("127.0.0.1", port)
    with pytest.raises(JobFailed, match=r"nodes 1, 3 did not come") as caught:
        first.wait(4)
    assert caught.value.category == "lost"
    first.close(done=False)
    with pytest.raises(JobFailed, match="node 0 does not answer"):
        Peers(1, lambda: None).join("127.0.0.1", port)


def test_the_way_to_an_address_of_this_machine_is_that_address():
    assert way_to("127.0.0.1") == ("127.0.0.1", "lo")


@pytest.mark.parametrize("given", ["node1", "node1:", ":29400", "node1:port"])
def test_a_rendezvous_without_host_or_port_is_refused(given):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        resolved(given, 0.0)


def test_a_name_may_become_known_later(monkeypatch):
    answers = [OSError("no such name"), [(0, 0, 0, "", ("10.0.0.7", 1))]]

    def lookup(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(network, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(network.socket, "getaddrinfo", lookup)
    assert resolved("pod-0.jobs:29400", 5.0) == ("10.0.0.7", 29400)
    answers[:] = [OSError("no such name")]
    with pytest.raises(ConfigError, match=r"the name of node 0, pod-0\.jobs, is not known here"):
        resolved("pod-0.jobs:29400", -1.0)
