"""Documented layouts: tokens and masks equal those of a whole text, rendered by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_core.data.rows.row import BadRow
from rlhf_core.errors import DataError
from tests.rlhf_core.data.encoding.test_templates import QWEN3
from tests.rlhf_core.data.helpers import byte_tokenizer
from tests.rlhf_core.data.rows.layouts import LAYOUTS, A, U, encoded, read

STOP = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def by_hand(tokenizer: Any, turns: list[tuple[str, str, bool]], open_: bool) -> Any:
    """(ids, mask) of a conversation: one text, with the loss on the characters of its replies."""
    text, covered = "", []
    for role, content, trained in turns:
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += content + STOP
        covered += [(start, len(text))] if trained else []
        text += "\n"
    text = text + "<|im_start|>assistant\n" if open_ else text[:-1]
    whole = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    mask = [any(a <= start and end <= b for a, b in covered)
            for start, end in whole["offset_mapping"]]  # fmt: skip
    return whole["input_ids"], mask


@pytest.mark.parametrize(
    ("purpose", "row", "turns", "replies"), [case[1:] for case in LAYOUTS],
    ids=[case[0] for case in LAYOUTS],
)  # fmt: skip
def test_layout_has_the_tokens_and_the_mask_of_the_whole_text(
    tokenizer, purpose, row, turns, replies
):
    batch = encoded(tokenizer, [row], purpose)
    assert batch.bad == []
    [out] = batch.rows.to_pylist()
    if purpose == "sft":
        ids, mask = by_hand(tokenizer, turns, open_=False)
        assert (out["input_ids"], out["trainable"]) == (ids, mask)
        return
    ids, _ = by_hand(tokenizer, turns, open_=True)
    assert out["prompt_ids"] == ids
    assert [(m["role"], m["content"]) for m in json.loads(out["prompt"])] == [t[:2] for t in turns]
    texts = {"preference": replies, "unpaired": replies[:1], "prompts": ()}[purpose]
    names = ["chosen_ids", "rejected_ids"] if purpose == "preference" else ["completion_ids"]
    for name, text in zip(names, texts, strict=False):
        assert out[name] == tokenizer(text + STOP, add_special_tokens=False)["input_ids"]
    if purpose == "unpaired":
        assert out["label"] is replies[1]


def test_implicit_prompt_is_read_only_when_the_settings_say_so(tokenizer):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    with pytest.raises(DataError, match="set format: implicit_prompt"):
        encoded(tokenizer, [row], "preference")
    [out] = encoded(tokenizer, [row], "preference", format="implicit_prompt").rows.to_pylist()
    assert json.loads(out["prompt"]) == [{"role": "user", "content": "The sky is"}]
    assert (out["chosen"], out["rejected"]) == (" blue.", " green.")
    example, _ = read({"chosen": "The sk", "rejected": "The sx"}, "preference",
                      format="implicit_prompt")  # fmt: skip
    assert (example.messages[0]["content"], example.chosen) == ("The", " sk")
    for chosen, rejected in (("Yes", "No"), ("The", "The sky")):
        with pytest.raises(BadRow, match="do not begin with the same words"):
            read({"chosen": chosen, "rejected": rejected}, "preference", format="implicit_prompt")


def test_rows_that_differ_in_trained_replies_are_no_duplicates(tokenizer):
    rows = [{"messages": [U, A, U, {**A, "weight": flag}]} for flag in (1, 0)]
    hashes = encoded(tokenizer, rows, "sft").rows.column("_text").to_pylist()
    assert len({*hashes}) == 2


def test_template_that_splits_conversations_splits_off_only_trained_replies():
    """A template that rewrites past replies makes a row of each reply that is trained on."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3
    turns = [U, {**A, "weight": 1}, U, {**A, "weight": 0}, U, {**A, "content": "Bye"}]
    batch = encoded(tokenizer, [{"messages": turns}], "sft")
    rows = batch.rows.to_pylist()
    trained = [
        tokenizer.decode(
            [i for i, kept in zip(r["input_ids"], r["trainable"], strict=True) if kept]
        )
        for r in rows
    ]
    assert (batch.cut, batch.bad) == (1, [])
    assert [text.split("\n")[-1] for text in trained] == ["Hello" + STOP, "Bye" + STOP]
    history = {"prompt": [U, A, U], "completion": "Bye"}
    [row] = encoded(tokenizer, [history], "sft").rows.to_pylist()
    prompt = tokenizer.apply_chat_template([U, A, U], tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row["input_ids"][: len(before)] == before
    assert row["trainable"] == [i >= len(before) for i in range(len(row["input_ids"]))]


def test_row_without_a_trained_reply_is_bad(tokenizer):
    batch = encoded(tokenizer, [{"messages": [U, {**A, "weight": 0}]}], "sft", on_bad_row="skip")
    assert [bad[2] for bad in batch.bad] == ["nothing_to_train"]
