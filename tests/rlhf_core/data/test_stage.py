"""The stage with a store, and data on a real S3 server."""

import json
from pathlib import Path

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.errors import DataError, RLHFError
from rlhf_core.jobs import DataJob, DataSettings
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.prepare_data import run
from rlhf_core.store import open_store
from tests.rlhf_core.data.helpers import byte_tokenizer, jsonl, prepared
from tests.rlhf_core.store.conftest import environment, s3_url, seaweed  # noqa: F401
from tests.rlhf_core.store.seaweed import BUCKET


def stage(tmp_path, **settings):
    store = open_store(f"file://{tmp_path / 'store'}")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = store.publish(tmp_path / "model", kind="model")
    job = DataJob(model=model.digest, purpose="prompts", **settings)
    return store, job, StageContext(store=store, key=job.key(), folder=tmp_path / "job")


def test_stage_publishes_a_data_set_with_its_card(tmp_path):
    store, job, context = stage(tmp_path, subset="english:food", heldout_fraction=0.2)
    artifact = run(job, context)
    assert artifact.kind == "dataset" and artifact.parents == (job.model,)
    assert store.stage_result(job.key()).digest == artifact.digest
    folder = store.fetch(artifact.digest)
    card = DataCard.load(folder)
    assert len(Rows(folder, "train", "prompts")) == card.splits["train"].rows > 0
    assert {path.name for path in folder.iterdir()} == {
        "train-00000.arrow", "heldout-00000.arrow", "card.json", "card.md",
    }  # fmt: skip
    assert (folder / "card.md").read_text().startswith("# Data card: builtin:chatterbot")


def test_stage_refuses_a_file_that_changed_since_the_run_was_started(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    settings = {"source": source, "fingerprint": fingerprint(DataSettings(source=source))}
    _, job, context = stage(tmp_path, heldout_fraction=0.0, **settings)
    run(job, context)
    jsonl(Path(source), [{"prompt": "b"}])
    with pytest.raises(DataError, match="changed after this run was started"):
        run(job, context)


@pytest.mark.slow
def test_s3_source(tmp_path, s3_url):  # noqa: F811
    from rlhf_core.data.sources.files import s3_filesystem

    fs = s3_filesystem()
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    path = s3_url.removeprefix("s3://")
    for name in ("b", "a"):
        fs.pipe(f"{path}/in/{name}.jsonl", json.dumps({"prompt": name}).encode() + b"\n")
    first = fingerprint(DataSettings(source=f"{s3_url}/in"))
    assert first == fingerprint(DataSettings(source=f"{s3_url}/in"))
    for source in (f"{s3_url}/in", f"{s3_url}/in/*.jsonl"):
        assert len(prepared(tmp_path / "out", source, "prompts")) == 2
    assert len(prepared(tmp_path / "out", f"{s3_url}/in/a.jsonl", "prompts")) == 1
    fs.pipe(f"{path}/in/a.jsonl", b'{"prompt": "c"}\n{\n')
    assert first != fingerprint(DataSettings(source=f"{s3_url}/in"))
    with pytest.raises(DataError, match=rf"{s3_url}/in/a.jsonl, row 2: malformed JSON"):
        prepared(tmp_path / "out", f"{s3_url}/in", "prompts")
    with pytest.raises(DataError, match="no such object or prefix"):
        prepared(tmp_path / "out", f"{s3_url}/nothing", "prompts")


def test_s3_that_cannot_be_reached_is_worth_a_retry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("RLHF_STORE_RETRIES", "0")
    with pytest.raises(RLHFError) as error:
        prepared(tmp_path / "out", "s3://bucket/a.jsonl", "prompts")
    assert error.value.category == "store"
    assert "RLHF_STORE_ENDPOINT" in str(error.value)
    assert check_source(DataSettings(source="s3://bucket/a.jsonl"))
