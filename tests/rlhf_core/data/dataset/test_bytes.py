"""A data set keeps its bytes from version to version: results that are stored are reused."""

import functools
import os
import time

import pytest

from rlhf_core.data.parallel import ordered_map
from rlhf_core.data.prepare import prepare
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl

TURNS = ["Hello, how are you?", "I am fine, thank you.\n\nAnd you?", "早上好，你好吗?", "Yes.  No."]
COLUMNS = {
    "sft": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompts": ("messages",),
    "pretrain": ("text",),
}
# As before any of the work on speed. Another pyarrow may write other bytes of the same rows.
DIGESTS = {
    "sft": "8400c1f7736dc063",
    "preference": "f3923294397bce83",
    "unpaired": "74527d2dccd5a059",
    "prompts": "1fc9c3b13b341efc",
    "pretrain": "f02cdade7cca7cb4",
}


def rows():
    for number in range(40):
        a, b, c, d = (f"{TURNS[(number + turn) % 4]} {number}" for turn in range(4))
        roles = ("user", "assistant", "user", "assistant")
        yield {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(roles, (a, b, c, d), strict=True)
            ],
            "prompt": a,
            "chosen": b,
            "rejected": c,
            "label": number % 2 == 0,
            "completion": b,
            "text": f"{a}\n\n{b} {c}",
        }


@pytest.mark.parametrize("purpose", COLUMNS)
def test_a_data_set_keeps_its_bytes(tmp_path, purpose):
    kept = [{name: row[name] for name in COLUMNS[purpose]} for row in rows()]
    source = jsonl(tmp_path / "a.jsonl", kept)
    length = {"max_length": 30} if purpose == "pretrain" else {}  # documents are split
    settings = job(source, purpose, heldout_fraction=0.2, **length)
    card = prepare(settings, byte_tokenizer(), tmp_path / "data", workers=1)
    assert card.digest[:16] == DIGESTS[purpose]


def slowly(seconds, number):
    time.sleep(seconds)
    return number, os.getpid()


def test_work_goes_to_all_processes_and_comes_back_in_order():
    found = list(ordered_map(functools.partial(slowly, 0.02), range(50), workers=3))
    assert [number for number, _ in found] == list(range(50))
    processes = {process for _, process in found}
    assert len(processes) == 3 and os.getpid() not in processes
