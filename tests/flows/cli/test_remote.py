"""Waiting for a run on a server that goes away meanwhile."""

from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.states import Completed, Running

from flows.cli import remote
from rlhf_core.errors import RLHFError


def waiting(monkeypatch, *answers):
    """Follow a run on a client that gives these answers, the last one for good."""
    left = list(answers)

    def read_flow_run(run):
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(state=answer)

    client = SimpleNamespace(read_flow_run=read_flow_run)
    monkeypatch.setattr(remote, "connect", lambda: client)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    remote.follow(uuid4(), None)


def test_server_that_is_started_again_does_not_end_the_waiting(monkeypatch, capsys):
    gone = httpx.ConnectError("Connection refused")
    waiting(monkeypatch, Running(), gone, gone, Running(), Completed(message="all is well"))
    said = capsys.readouterr()
    assert said.out == "all is well\n"
    assert [line.split()[1] for line in said.err.splitlines()] == ["Running", "Completed"]


def test_server_that_stays_away_ends_the_waiting_with_a_message(monkeypatch):
    monkeypatch.setattr(remote, "SERVER_SECONDS", 0.05)
    with pytest.raises(RLHFError, match=r"has not answered.*Connection refused.*may go on"):
        waiting(monkeypatch, Running(), httpx.ConnectError("Connection refused"))
