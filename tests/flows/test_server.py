"""Which Prefect server is used, and what is said about it."""

import base64
import http.server
import os
import stat
import sys
import threading

import pytest

from flows import api_server, server
from flows.cli import remote, system
from rlhf_core.errors import ConfigError


@pytest.fixture
def answering():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            login = self.headers.get("Authorization")
            closed = self.path.endswith("/version") and self.server.login not in (None, login)
            self.send_response(401 if closed else 200)
            in_api = self.path.startswith("/api") or not self.server.pages
            self.send_header("Content-Type", "application/json" if in_api else "text/html")
            self.end_headers()
            self.wfile.write(self.server.text if in_api else self.server.pages)

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.text, listening.login, listening.pages = b"true", None, b""
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
    assert (
        "PREFECT_API_URL is http://127.0.0.1:9/api, where no Prefect server answers" in found.text
    )
    assert "PREFECT_API_URL" not in os.environ


def test_api_that_was_forgotten_in_the_address_is_named(answering):
    listening, api = answering
    pages = api.removesuffix("/api")
    listening.pages = b"<html>"
    os.environ["PREFECT_API_URL"] = pages
    found = server.choose_server()
    assert found.url is None
    assert found.problem.startswith(
        f"PREFECT_API_URL is {pages}, where no Prefect server answers: "
    )
    assert "the answer is no JSON but text/html" in found.problem
    assert found.problem.endswith(f"answers at {api}: set PREFECT_API_URL to that")
    os.environ["PREFECT_API_URL"] = pages
    with pytest.raises(ConfigError, match=r"no JSON but text/html.*rlhf up"):
        remote.connect()


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


def test_server_that_asks_for_a_login_is_used_with_the_right_one_only(answering, monkeypatch):
    answering[0].login = f"Basic {base64.b64encode(b'ada:enchantress').decode()}"
    os.environ["PREFECT_API_URL"] = answering[1]
    assert "asks for a login, and PREFECT_API_AUTH_STRING is not set" in server.choose_server().text
    os.environ |= {"PREFECT_API_URL": answering[1], "PREFECT_API_AUTH_STRING": "ada:wrong"}
    assert "PREFECT_API_AUTH_STRING is wrong" in server.choose_server().text
    monkeypatch.setattr(server, "DEFAULT_URL", answering[1])
    assert "runs, and refuses: it asks for a login" in server.choose_server().text
    os.environ |= {"PREFECT_API_URL": answering[1], "PREFECT_API_AUTH_STRING": "ada:enchantress"}
    assert server.choose_server().url == answering[1]


def test_login_is_made_once_and_private_and_may_be_ones_own(tmp_path):
    path = tmp_path / "login"
    login = api_server.kept_login(path)
    assert login == api_server.kept_login(path) != api_server.new_login()
    assert login.startswith("rlhf:") and len(login) > 30
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("ada:enchantress\n")
    assert api_server.kept_login(path) == "ada:enchantress"
    for wrong in ("", "enchantress", "a:b", "ada:enchantress\nbob:builder"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"login holds no login: expected one line"):
            api_server.kept_login(path)


def test_login_of_this_machines_system_goes_to_no_other_server(monkeypatch):
    ours = {"PREFECT_API_URL": "http://127.0.0.1:4200/api", api_server.LOGIN: "rlhf:secret-one"}
    found = system.System(1, 1.0, "ready", environment={**ours, "RLHF_STORE": "s3://x"})
    monkeypatch.setattr(system, "read", lambda: found)
    for url, sent in (
        (None, "rlhf:secret-one"), ("http://localhost:4200/api/", "rlhf:secret-one"),
        ("https://prefect.example/api", None), ("http://127.0.0.1:4201/api", None),
    ):  # fmt: skip
        for name in ours:
            os.environ.pop(name, None)
        os.environ |= {"PREFECT_API_URL": url} if url else {}
        system.join()
        assert os.environ.get(api_server.LOGIN) == sent, url
        assert os.environ["PREFECT_API_URL"] == (url or ours["PREFECT_API_URL"])


def test_what_the_user_has_set_stays():
    os.environ |= {"PREFECT_HOME": "/x", "PREFECT_SERVER_ANALYTICS_ENABLED": "true"}
    server.choose_server()
    assert os.environ["PREFECT_HOME"] == "/x"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true"


def test_temporary_server_that_ends_at_once_is_one_message(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    started = server.TemporaryServer()
    try:
        with pytest.raises(ConfigError, match=r"did not start: it exited with code 1\.\n.*log"):
            started.wait()
    finally:
        monkeypatch.setattr(server, "temporary", None)
        started.stop()


def test_temporary_server_has_a_login_that_only_this_command_and_its_children_know(
    monkeypatch, tmp_path
):
    shows = tmp_path / "python"
    shows.write_text("#!/bin/sh\nenv\necho arguments=$@\n")
    shows.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shows))
    started = server.TemporaryServer()
    monkeypatch.setattr(server, "temporary", None)
    started._process.wait(60)
    started.stop()
    said = dict(line.split("=", 1) for line in started.log.read_text().splitlines() if "=" in line)
    login = os.environ[api_server.LOGIN]
    assert said["PREFECT_SERVER_API_AUTH_STRING"] == login
    assert said["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == started.url.removesuffix("/api")
    assert "127.0.0.1" in said["arguments"] and login not in said["arguments"]
    assert stat.S_IMODE(started.log.parent.stat().st_mode) == 0o700
