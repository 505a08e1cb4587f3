"""Requests to the Hugging Face hub: one that does not answer, and one that refuses."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.sources import hub
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataSettings, ModelSettings
from rlhf_core.model_files.source_check import check_model
from rlhf_core.system.ports import free_ports

DATA = DataSettings(source="no-such-organisation/data")
MODEL = ModelSettings(source="no-such-organisation/model")


class Refuses(BaseHTTPRequestHandler):
    paths: ClassVar[list[str]] = []
    branch: ClassVar[str] = ""  # commit of main; empty: there is none

    def do_GET(self) -> None:
        self.paths.append(self.path)
        if self.branch and self.path.endswith(f"/datasets/{DATA.source}"):
            body = json.dumps({"id": DATA.source, "sha": self.branch}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        code = "RepoNotFound" if "/models/" in self.path else "RevisionNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture()
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that knows nothing."""
    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at(monkeypatch, server.server_port)
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture()
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that nobody runs."""
    at(monkeypatch, free_ports(1)[0])


def at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)
    template = "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(template, url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.mark.usefixtures("away")
def test_hub_that_does_not_answer_is_one_problem():
    [problem] = check_source(DATA)
    assert problem.startswith("no-such-organisation/data: there is no such local file, and the ")
    assert "hub cannot be reached" in problem and "HF_ENDPOINT" in problem
    [problem] = check_model(MODEL)
    assert problem.startswith("no-such-organisation/model is not in this machine's Hugging Face")
    assert "hub cannot be reached" in problem and "builtin:" in problem
    assert hub.hub_commit(DATA) == "main"
    with pytest.raises(StoreUnavailable):
        hub.ask_hub(lambda api: api.dataset_info("a/b", timeout=1))


@pytest.mark.usefixtures("refusing")
def test_hub_that_refuses_is_reachable():
    assert hub.hub_problem(DATA) == ""
    [problem] = check_model(MODEL)
    assert "the hub has no model 'no-such-organisation/model'" in problem
    assert hub.hub_commit(DATA) == "main"


@pytest.mark.usefixtures("refusing")
def test_commit_of_the_fingerprint_is_what_is_loaded_though_the_branch_moves_on(monkeypatch):
    old, new = "0123456789" * 4, "9876543210" * 4
    monkeypatch.setattr(Refuses, "branch", old)
    found = fingerprint(DATA)
    assert found == f"hub:{DATA.source}@{old}"
    monkeypatch.setattr(Refuses, "branch", new)
    assert fingerprint(DATA) != found
    Refuses.paths.clear()
    with pytest.raises(DataError):  # it has no files
        list(open_rows(DATA, fingerprint=found))
    assert any(f"/resolve/{old}/" in path for path in Refuses.paths)
    assert not any("main" in path or new in path for path in Refuses.paths), Refuses.paths
