"""The store goes away in the middle of training, and again at its end; a real S3 server."""

import time

import pytest

from tests.faults.stage import Place, end, make_job
from tests.rlhf_core.algorithms.stages import weight_hashes
from tests.rlhf_core.store.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, SeaweedServer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path):
    made = SeaweedServer(tmp_path / "server")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def place(base, tmp_path, server, monkeypatch):
    """A store on the server with the inputs; requests are not repeated by the store itself, so that
    a short absence is a long one."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", server.endpoint)
    monkeypatch.setenv("RLHF_STORE_RETRIES", "0")
    monkeypatch.setenv("RLHF_STORE_CONNECT_TIMEOUT", "1")
    source = Place(base[0], tmp_path / "source").store
    made = Place(base[0], tmp_path / "place", f"s3://{BUCKET}/x")
    for name in ("model", "sft"):
        artifact = source.get(base[1][name])
        made.store.publish(
            source.fetch(artifact.digest), kind=artifact.kind,
            metadata=artifact.metadata, parents=artifact.parents,
        )  # fmt: skip
    return made


def until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_training_goes_on_and_the_result_waits_for_the_store(place, inputs, server, undisturbed):
    job = make_job(inputs, "sft", {"ranks": 2, "strategy": "zero2", "checkpoint_every": 1})
    last = place.folder / "last-steps"
    pace = [{"what": "sleep", "seconds": 0.3}, {"what": "sleep", "update": 11, "until": str(last)}]
    process = place.start(job, pace)
    try:
        until(lambda: place.checkpoints(job))
        server.kill()
        seen = place.steps()
        until(lambda: place.steps() >= seen + 4)  # training goes on
        server.start()
        until(lambda: "is stored, after" in place.log())
        # What is stored now was made while the server was away, or after.
        assert max(place.checkpoints(job)) >= seen
        server.kill()
        last.touch()
        until(lambda: "WARNING: the result waits for the store" in place.log())
        assert place.steps() == 12
        time.sleep(1)
        assert process.poll() is None
        server.start()
        process.wait(60)
    finally:
        end(process)
    assert process.returncode == 0, place.log()[-3000:]
    artifact = place.result(job)
    assert place.store.verify(artifact.digest) == []
    assert weight_hashes(artifact) == weight_hashes(undisturbed["sft"][1])
    assert place.checkpoints(job) == []
    assert SECRET_KEY not in place.log() + place.said()
