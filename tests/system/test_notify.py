"""What a failed run and a published model send to whoever wants to know, over a real socket."""

import http.server
import json
import threading

import pytest

from tests.system.conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.usefixtures("stand_ins")]


@pytest.fixture
def received():
    """Bodies that were posted, and the address to post to."""
    bodies = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bodies_and_url = (bodies, f"http://127.0.0.1:{server.server_port}/secret-part")
    yield bodies_and_url
    server.shutdown()


def test_failures_and_published_models_are_told(system, received):
    bodies, url = received
    system.environment["RLHF_NOTIFY_SECRET"] = url
    said = system.rlhf("notify", "webhook")
    del system.environment["RLHF_NOTIFY_SECRET"]
    assert "rlhf-notify-webhook" in said
    assert "secret-part" not in said
    system.plan(sft=["data"])
    failed = system.submit("seed=601", "name=unlucky")
    system.wait(failed, "FAILED")
    [told] = until(lambda: bodies, 30, "the first message")
    assert told["subject"] == "rlhf-pipeline: unlucky failed"
    assert told["text"].startswith("DataError: ") and "stub ran into data" in told["text"]
    assert f"/runs/flow-run/{failed}" in told["text"]

    system.plan()
    lucky = system.submit("seed=602", "publish.name=notified")
    system.wait(lucky, "COMPLETED")
    told = until(lambda: bodies[1:], 30, "the second message")[0]
    assert told["subject"] == "notified has a new version"
    assert told["text"].startswith("published/")
    assert len(bodies) == 2  # one each, nothing about single stages

    assets = system.post(
        "/events/filter",
        {
            "filter": {
                "event": {"name": ["prefect.asset.materialization.succeeded"]},
                "related": {"id": [f"prefect.flow-run.{lucky}"]},
                "order": "ASC",
            },
            "limit": 50,
        },
    )["events"]
    made = {e["resource"]["prefect.resource.id"].split("/artifacts/")[1] for e in assets}
    kinds = [name.partition("/")[0] for name in made]
    assert {"model", "dataset", "reward_model", "evaluation", "published"} == set(kinds)
    for event in assets:  # parents are assets that were made, or were there
        for related in event["related"]:
            if related["prefect.resource.role"] == "asset":
                assert related["prefect.resource.id"].split("/artifacts/")[1] in made
