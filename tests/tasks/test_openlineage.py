"""OpenLineage's events of a run, received by a real HTTP server."""

import json
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect.exceptions import Pause

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import SFTJob
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import check
from rlhf_core.system.ports import free_ports
from tasks.execute import _observed
from tasks.observers import observed, state_after
from tasks.run import Run, StageResult

LOG = logging.getLogger("test")


def run_on(store, name="run-1"):
    return Run(build_config("smoke", ["openlineage={namespace: team}"]), name, store)


def add(run, stage, *parents, reused=False):
    made = run.store.publish_derived(
        kind="model", files={"config.json": stage.encode()}, parents=parents
    )
    result = StageResult(
        stage=stage, digest=made.digest, kind="model", key="k", reused=reused, seconds=5.0
    )
    run.add(result)
    return made.digest


def pipeline(run, fail=None):
    """What a flow does inside the block: a reused stage, one that fails at first, publishing."""
    run.begin()
    base = add(run, "model", reused=True)
    job = SFTJob(model=base, data=base, seed=0)
    for error in (JobFailed("a rank died: hf_" + "x" * 30, "lost"), None):
        try:
            with _observed(run, {"sft": job}):
                if error:
                    raise error
        except JobFailed:
            continue
    if fail is None:
        made = add(run, "sft", base)
        add(run, "publish", made)
        return
    with _observed(run, {"ppo": job}):
        raise fail


@pytest.fixture
def server(monkeypatch):
    """Keeps what it gets; a lineage server as far as its clients see."""
    events = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            events.append({**json.loads(body), "path": self.path,
                           "key": self.headers.get("Authorization")})  # fmt: skip
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address(monkeypatch)
    monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "marked-secret")
    yield events
    server.shutdown()
    server.server_close()


def address(monkeypatch, **transport):
    """Set OpenLineage's own variables, and no others: the client itself writes some."""
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        monkeypatch.delenv(name)
    for name, value in transport.items():
        monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__{name}", value)


def brief(events):
    return [(e["eventType"], e["job"]["name"].removeprefix("smoke").lstrip(".")) for e in events]


def refs(datasets):
    return [d["name"] for d in datasets]


@pytest.mark.extras
def test_each_stage_has_a_run_with_its_artifacts_below_the_pipelines(tmp_path, store, server):
    run = run_on(store)
    with observed(run, LOG):
        pipeline(run)
    assert brief(server) == [
        ("START", ""), ("START", "model"), ("COMPLETE", "model"), ("START", "sft"), ("FAIL", "sft"),
        ("START", "sft"), ("COMPLETE", "sft"), ("START", "publish"), ("COMPLETE", "publish"),
        ("COMPLETE", ""),
    ]  # fmt: skip
    assert {(e["path"], e["key"]) for e in server} == {("/api/v1/lineage", "Bearer marked-secret")}
    parent, ids = server[0]["run"]["runId"], [e["run"]["runId"] for e in server]
    assert ids[-1] == parent and len(set(ids)) == 5  # the second attempt at sft is another run
    assert ids[3] == ids[4] != ids[5] == ids[6]
    for event in server[1:-1]:
        facet = event["run"]["facets"]["parent"]
        assert facet["run"]["runId"] == parent
        assert facet["job"] == {"namespace": "team", "name": "smoke", "facets": {}}
        assert event["job"]["namespace"] == "team"
    assert [e["run"]["facets"]["rlhf_stage"]["reused"] for e in server[1:-1]] == [
        False, True, *[False] * 6,
    ]  # fmt: skip
    base = server[2]["outputs"][0]
    assert base == {"namespace": store.url, "name": f"model/{run.stages['model'].digest}",
                    "facets": {}, "outputFacets": {}}  # fmt: skip
    assert refs(server[5]["inputs"]) == refs(server[6]["inputs"]) == [base["name"]]
    assert refs(server[7]["inputs"]) == refs(server[6]["outputs"])
    assert server[7]["eventTime"] < server[6]["eventTime"]  # it began before it was told
    error = server[4]["run"]["facets"]["errorMessage"]
    assert (error["message"], error["programmingLanguage"]) == ("a rank died: ***", "PYTHON")


@pytest.mark.extras
@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (KeyboardInterrupt(), [("ABORT", "ppo"), ("ABORT", "")]),
        (JobFailed("out", "preempted"), [("ABORT", "ppo"), ("FAIL", "")]),
        (ZeroDivisionError("x"), [("FAIL", "ppo"), ("FAIL", "")]),
    ],
    ids=["cancelled", "preempted", "failed"],
)
def test_run_that_does_not_finish_is_failed_or_aborted(store, server, error, ends):
    run = run_on(store)
    with pytest.raises(type(error)), observed(run, LOG):
        pipeline(run, error)
    assert brief(server)[-2:] == ends


@pytest.mark.extras
def test_retried_run_goes_on_in_the_same_one_with_new_attempts(store, server, monkeypatch):
    run = run_on(store)
    with pytest.raises(Pause), observed(run, LOG):
        pipeline(run, Pause())
    first = {e["run"]["runId"] for e in server}
    assert ("COMPLETE", "") not in brief(server) and ("ABORT", "") not in brief(server)
    monkeypatch.setattr("prefect.runtime.flow_run.run_count", 2, raising=False)
    with observed(run, LOG):
        pipeline(run)
    again = {e["run"]["runId"] for e in server} - first
    assert len(again) == 4 and server[0]["run"]["runId"] == server[-1]["run"]["runId"]


@pytest.mark.extras
def test_server_that_is_away_is_said_once_and_fails_nothing(store, monkeypatch, caplog):
    def said():
        with observed(run_on(store), LOG):
            pass
        found = [r.getMessage() for r in caplog.records if "could not be sent" in r.getMessage()]
        caplog.clear()
        return found

    address(monkeypatch)
    assert said() == [
        "openlineage: an event could not be sent: no address is set: OPENLINEAGE_URL, or a file "
        "openlineage.yml. The run goes on without it."
    ]
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    address(monkeypatch, TYPE="http", URL=url, RETRY='{"total": 0}')
    [one] = said()
    assert "Connection refused" in one


def test_missing_package_is_found_before_anything_is_trained(monkeypatch, tmp_path):
    known = check.__globals__["find_spec"]
    monkeypatch.setitem(
        check.__globals__, "find_spec", lambda name: None if name == "openlineage" else known(name)
    )
    config = build_config("smoke", [f"store={tmp_path}", "openlineage={}"])
    assert [p for p in check(config) if 'pip install "rlhf-pipeline[openlineage]"' in p]


def test_each_way_to_end_has_its_state():
    errors = [None, Pause(), ValueError(), KeyboardInterrupt()]
    assert [state_after(e) for e in errors] == ["completed", "waiting", "failed", "cancelled"]
