"""The stage with a store."""

from pathlib import Path

import pytest

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, DataSettings
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.prepare_data import run
from rlhf_core.store import open_store
from tests.rlhf_core.data.helpers import byte_tokenizer, jsonl


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


def test_log_says_what_was_not_read(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "a.jsonl", [{"prompt": "a", "source": "web"}])
    for number in range(7):
        (tmp_path / "in" / f"{number}.log").write_text("x")
    _, job, context = stage(tmp_path, heldout_fraction=0.0, source=str(tmp_path / "in"))
    run(job, context)
    lines = capsys.readouterr().out.splitlines()
    assert "not used of these rows: column 'source'" in lines
    [line] = [line for line in lines if line.startswith("left out of the source: ")]
    assert "0.log (no data file), 1.log" in line and line.endswith("4.log (no data file), 2 more")
