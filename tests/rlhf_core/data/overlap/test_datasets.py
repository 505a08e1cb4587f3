"""A measurement's prompts are looked for in whole data sets, of every purpose."""

from __future__ import annotations

import pytest

from rlhf_core.data.overlap import datasets
from rlhf_core.data.overlap.datasets import contamination
from rlhf_core.data.prepare import prepare
from rlhf_core.jobs import EvaluateJob, LmEvalJob
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl

LONG = " ".join("abcdefghijklmnop")  # 16 words, 4 passages
HALF = " ".join("abcdefghijklmn")  # 2 of them
ROWS = {
    "sft": [{"prompt": "Hi", "completion": f"I quote: {LONG.upper()}."}],
    "preference": [{"prompt": "How are you?", "chosen": "Well.", "rejected": HALF}],
    "unpaired": [{"prompt": f"So {LONG}?", "completion": "Yes.", "label": True}],
    "prompts": [{"prompt": f"{HALF}?"}],
    "pretrain": [{"text": f"{LONG} {LONG}"}, {"text": "how are YOU"}, {"text": "Other."}],
}
# rows: shared, near; prompts: shared, near
EXPECTED = {
    "sft": (1, 1, 1, 1),
    "preference": (1, 1, 2, 1),  # the prompt as a whole, and half of the long one in a reply
    "unpaired": (1, 1, 1, 1),
    "prompts": (1, 0, 1, 0),
    "pretrain": (2, 2, 2, 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data sets")
    for name, rows in ROWS.items():
        source = jsonl(folder / f"{name}.jsonl", rows)
        prepare(job(source, name, max_length=90), byte_tokenizer(), folder / name, workers=1)
    return {name: folder / name for name in ROWS}


def test_prompts_are_found_in_data_sets_of_each_purpose(folders):
    asked = {"ours": [LONG, "How are you?", "What is new?"], "others": ["Nothing of it."]}
    found = contamination(asked, folders, byte_tokenizer())
    assert {
        name: (r["shared_rows"], r["near_rows"], r["shared_prompts"], r["near_prompts"])
        for name, r in found["ours"].items()
    } == EXPECTED
    assert found["ours"]["pretrain"]["rows"] >= 3 and found["ours"]["sft"]["prompts"] == 3
    assert all(row["shared_rows"] == 0 for row in found["others"].values())
    example = found["ours"]["prompts"]["examples"][0]
    assert (example["prompt"], example["share"], example["passage"]) == (LONG, 0.5, HALF)


def test_rows_beyond_the_bound_are_counted(folders, monkeypatch):
    monkeypatch.setattr(datasets, "MOST_ROWS", 1)
    found = contamination({"ours": [LONG]}, folders, byte_tokenizer())["ours"]
    assert found["pretrain"]["rows"] == 1 and found["pretrain"]["rows_left_out"] >= 2
    assert found["sft"]["rows_left_out"] == 0


def test_data_set_in_two_roles_is_compared_once_and_an_absent_one_is_not_in_the_key():
    sft, pairs, prompts = ("1" * 64, "2" * 64, "3" * 64)
    models = {"base": "0" * 64, "policy": "0" * 64}
    evaluate = EvaluateJob(**models, prompts=prompts, sft_data=sft, ptx_data=sft)
    assert evaluate.training_data() == {"sft": sft, "prompts": prompts}
    plain = LmEvalJob(**models, tasks=["arc_easy"])
    assert plain.training_data() == {}
    assert not {"prompts", "preference_data"} & set(plain.key_settings())
    assert plain.model_copy(update={"preference_data": pairs}).key() != plain.key()
