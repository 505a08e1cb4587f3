"""Which Prefect server is used, and what is said about it."""

import http.server
import os
import threading

import pytest

from flows import server
from rlhf_core.errors import ConfigError


@pytest.fixture
def answering():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.text)

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.text = b"true"
    threading.Thread(target=listening.serve_forever).start()
    yield listening, f"http://127.0.0.1:{listening.server_port}/api"
    listening.shutdown()
    listening.server_close()


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= {"RLHF_HOME": str(tmp_path / "rlhf"), "HOME": str(tmp_path)}
    monkeypatch.setattr(server, "DEFAULT_URL", "http://127.0.0.1:9/api")


def test_running_server_of_the_environment_is_used(answering):
    os.environ["PREFECT_API_URL"] = answering[1]
    assert server.choose_server() == server.Server(answering[1], answering[1])


def test_server_at_the_default_address_is_found(answering, monkeypatch):
    monkeypatch.setattr(server, "DEFAULT_URL", answering[1])
    assert server.choose_server().url == answering[1]
    assert os.environ["PREFECT_API_URL"] == answering[1]


def test_without_a_server_a_temporary_one_is_announced():
    found = server.choose_server()
    assert found == server.Server(None, "a temporary server (PREFECT_API_URL is not set)")
    assert os.environ["PREFECT_HOME"] == os.environ["RLHF_HOME"] + "/prefect"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_server_that_does_not_answer_is_named():
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    found = server.choose_server()
    assert "PREFECT_API_URL is http://127.0.0.1:9/api, which does not answer" in found.text
    assert "PREFECT_API_URL" not in os.environ


def test_something_else_at_the_address_is_not_taken_for_prefect(answering):
    answering[0].text = b"<html>"
    assert server.unreachable(answering[1], 2) is not None
    answering[0].text = b'"yes"'
    assert (
        server.unreachable(answering[1], 2) == "something else than a Prefect server answers there"
    )


def test_server_of_the_users_profile_is_used(answering, tmp_path):
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect/profiles.toml").write_text(
        f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{answering[1]}"\n'
    )
    assert server.choose_server().url == answering[1]
    assert "PREFECT_HOME" not in os.environ


def test_what_the_user_has_set_stays():
    os.environ |= {"PREFECT_HOME": "/x", "PREFECT_SERVER_ANALYTICS_ENABLED": "true"}
    server.choose_server()
    assert os.environ["PREFECT_HOME"] == "/x"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true"


def test_temporary_server_that_ends_at_once_is_one_message(monkeypatch):
    monkeypatch.setattr(server.sys, "executable", "/bin/false")
    started = server.TemporaryServer()
    try:
        with pytest.raises(ConfigError, match=r"did not start: it exited with code 1\.\n.*log"):
            started.wait()
    finally:
        monkeypatch.setattr(server, "temporary", None)
        started.stop()
