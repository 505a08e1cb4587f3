"""Documents that are longer than a row may be: cut for pretraining, dropped for everything else."""

import pytest

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.prepare import prepare
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl, prefixing_tokenizer

LONG = " ".join(f"word{i}" for i in range(60))


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, prefixing_tokenizer])
@pytest.mark.parametrize("length", [2, 3, 16, 17])
def test_cutting_loses_no_token_and_trains_on_none_twice(tmp_path, make_tokenizer, length):
    source = jsonl(tmp_path / "a.jsonl", [{"text": LONG}, {"text": "Hi"}])
    tokenizer = make_tokenizer()
    whole = tmp_path / "whole"
    prepare(job(source, "pretrain"), tokenizer, whole, workers=1)
    cut = tmp_path / "cut"
    card = prepare(job(source, "pretrain", max_length=length), tokenizer, cut, workers=1)
    trained = {}
    for folder in (whole, cut):
        rows = list(Rows(folder, "train", "pretrain"))
        assert folder == whole or all(2 <= len(r["input_ids"]) <= length for r in rows)
        trained[folder] = sorted(
            t for r in rows for t, m in zip(r["input_ids"], r["trainable"], strict=True) if m
        )
    assert trained[cut] == trained[whole]
    assert card.read == 2 and card.dropped == {} and card.cut == card.kept - 2 > 0
    assert DataCard.load(cut) == card
    assert f"{card.cut} more by splitting" in card.summary()


def test_pieces_by_hand(tmp_path):
    """Letters are tokens here; E ends the text."""
    tokenizer = byte_tokenizer()
    source = jsonl(tmp_path / "a.jsonl", [{"text": "zqxjk"}])
    prepare(job(source, "pretrain", max_length=3), tokenizer, tmp_path / "out", workers=1)
    rows = sorted(Rows(tmp_path / "out", "train"), key=lambda r: "zqxjk".find(
        tokenizer.decode(r["input_ids"][:1])))  # fmt: skip
    z, q, x, j, k = tokenizer("zqxjk")["input_ids"]
    end = tokenizer.eos_token_id
    assert [r["input_ids"] for r in rows] == [[z, q, x], [x, j, k], [k, end]]
    assert [r["trainable"] for r in rows] == [
        [True, True, True], [False, True, True], [False, True]
    ]  # fmt: skip


def test_pieces_stay_on_one_side_and_duplicates_go_as_a_whole(tmp_path):
    texts = [f"{i} {LONG}" for i in range(20)]
    source = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts + texts[:5]])
    card = prepare(
        job(source, "pretrain", max_length=32, heldout_fraction=0.4), byte_tokenizer(),
        tmp_path / "out", workers=1,
    )  # fmt: skip
    sides = [{r["row"] for r in Rows(tmp_path / "out", s)} for s in ("train", "heldout")]
    assert sides[0] | sides[1] == set(range(1, 21)) and not sides[0] & sides[1]
    assert sides[0] and sides[1]
    assert card.read == 25 and card.dropped["duplicate"] == card.kept / 20 * 5


def test_other_purposes_still_drop(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": LONG}, {"text": "Hi"}])
    card = prepare(job(source, "sft", max_length=16), byte_tokenizer(), tmp_path / "o", workers=1)
    assert card.dropped == {"too_long": 1} and card.cut == 0
    assert '"cut"' not in (tmp_path / "o" / "card.json").read_text()


def test_pieces_of_one_token_are_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": LONG}])
    with pytest.raises(DataError, match="max_length is 1"):
        prepare(job(source, "pretrain", max_length=1), byte_tokenizer(), tmp_path / "o", workers=1)


def test_only_pretraining_data_have_new_keys(monkeypatch):
    """What was prepared for another purpose before there was cutting is found again."""
    jobs = {p: DataJob(purpose=p, model="0" * 64) for p in ("sft", "preference", "prompts")}
    assert {p: j.current_version() for p, j in jobs.items()} == dict.fromkeys(jobs, DataJob.version)
    pretrain = jobs["sft"].model_copy(update={"purpose": "pretrain"})
    new = pretrain.key()
    monkeypatch.setattr(DataJob, "current_version", lambda self: 1)
    assert pretrain.key() != new
