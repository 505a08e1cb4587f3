"""Documented layouts: tokens and masks equal those of a whole text, rendered by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_core.data.encoding.builtin_templates import SOURCES
from rlhf_core.data.rows.row import BadRow
from rlhf_core.errors import DataError
from tests.rlhf_core.data.encoding.test_templates import (
    GPT_OSS,
    NOTHING,
    OPENED,
    QWEN3,
    QWEN35,
    R1,
)
from tests.rlhf_core.data.helpers import byte_tokenizer
from tests.rlhf_core.data.rows.layouts import BAD, LAYOUTS, A, U, encoded, read

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


def whole_text(tokenizer: Any, turns: list[tuple[str, str, bool]]) -> Any:
    """(ids, mask) of a conversation that is rendered once, by the positions of its replies."""
    messages = [{"role": role, "content": content} for role, content, _ in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    covered, at = [], 0
    for role, content, trained in turns:
        start = text.index(content, at)
        at = start + len(content)
        if role == "assistant":
            assert text[at:].startswith(tokenizer.eos_token)
            at += len(tokenizer.eos_token)
            covered += [(start, at)] if trained else []
    whole = tokenizer(text[:at], return_offsets_mapping=True, add_special_tokens=False)
    return whole["input_ids"], [
        any(a <= start and end <= b for a, b in covered) for start, end in whole["offset_mapping"]
    ]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "chatml"])
def test_layouts_have_the_tokens_and_masks_of_the_whole_text_in_every_builtin_template(name):
    tokenizer = byte_tokenizer(name)
    for title, purpose, row, turns, replies in LAYOUTS:
        [out] = encoded(tokenizer, [row], purpose).rows.to_pylist()
        if purpose == "sft":
            assert (out["input_ids"], out["trainable"]) == whole_text(tokenizer, turns), title
            continue
        before = [(*turn[:2], False) for turn in turns]
        texts = {"preference": replies, "unpaired": replies[:1], "prompts": ("Any.",)}[purpose]
        names = {"preference": ["chosen_ids", "rejected_ids"], "unpaired": ["completion_ids"]}
        for text, ids in zip(texts, names.get(purpose, [""]), strict=True):
            whole, mask = whole_text(tokenizer, [*before, ("assistant", text, True)])
            start = mask.index(True)
            assert out["prompt_ids"] == whole[:start], title
            assert not ids or out[ids] == whole[start:], title


@pytest.mark.parametrize(
    ("template", "start"),
    [(QWEN3, "<think>\n\n</think>\n\n"), (QWEN35, NOTHING), (R1, NOTHING), (GPT_OSS, "<final>"),
     (OPENED, NOTHING)],
    ids=["qwen3", "qwen3.5", "r1", "gpt-oss", "opened"],
)  # fmt: skip
def test_layouts_have_the_tokens_of_each_generation_where_past_replies_are_rewritten(
    template, start
):
    """Each trained reply is a row: the rendered prompt, then what generation writes after it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    end = "\n" + STOP if template == OPENED else STOP

    def generated(turns: Any, reply: str) -> tuple[list[int], int]:
        messages = [{"role": role, "content": content} for role, content, _ in turns]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer(prompt + start + reply + end, return_offsets_mapping=True)
        first = [a for a, _ in whole["offset_mapping"]].index(len(prompt))
        return whole["input_ids"], first

    for title, purpose, row, turns, replies in LAYOUTS:
        rows = encoded(tokenizer, [row], purpose).rows.to_pylist()
        if purpose == "sft":
            trained = [i for i, turn in enumerate(turns) if turn[2]]
            for out, turn in zip(rows, trained, strict=True):
                ids, first = generated(turns[:turn], turns[turn][1])
                assert out["input_ids"] == ids, title
                assert out["trainable"] == [i >= first for i in range(len(ids))], title
            continue
        texts = {"preference": replies, "unpaired": replies[:1], "prompts": ("Any.",)}[purpose]
        names = {"preference": ["chosen_ids", "rejected_ids"], "unpaired": ["completion_ids"]}
        for text, name in zip(texts, names.get(purpose, [""]), strict=True):
            ids, first = generated(turns, text)
            assert rows[0]["prompt_ids"] == ids[:first], title
            assert not name or rows[0][name] == ids[first:], title


KEYED = QWEN3.replace(
    "{% elif '</think>'",
    "{% elif m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}"
    "{% elif '</think>'",
)
HARMONY = GPT_OSS.replace(
    "[assistant]<final>",
    "[assistant]{% if m.thinking and loop.last %}<why>{{ m.thinking }}<end>[assistant]{% endif %}"
    "<final>",
)


@pytest.mark.parametrize(
    ("template", "past", "start"),
    [(KEYED, "", "<think>\n{}\n</think>\n\n"), (R1, "", "{}\n</think>\n\n"),
     (HARMONY, "<final>", "<why>{}<end>[assistant]<final>")], ids=["qwen3", "r1", "gpt-oss"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_key_of_its_own_is_trained_as_generation_writes_it(
    template, past, start, key
):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    talk = [U, {**A, key: "Greet."}, U, {**A, "content": "Bye", key: "Leave."}]
    first, last = encoded(tokenizer, [{"messages": talk}], "sft").rows.to_pylist()
    opened = "<think>\n" if template == R1 else ""
    end = "<end>" if template == HARMONY else STOP
    prompts = [
        f"[user]Hi{STOP}[assistant]",
    ]
    prompts.append(f"{prompts[0]}{past}Hello{end}[user]Hi{STOP}[assistant]")
    for row, prompt, why, reply in zip(
        (first, last), prompts, ("Greet.", "Leave."), ("Hello", "Bye"), strict=True
    ):
        before = tokenizer(prompt + opened)["input_ids"]
        assert row["input_ids"] == before + tokenizer(start.format(why) + reply + STOP)["input_ids"]
        assert row["trainable"] == [i >= len(before) for i in range(len(row["input_ids"]))]


def test_reasoning_that_would_be_lost_is_refused(tokenizer):
    why = {**A, "reasoning_content": "Greet."}
    batch = encoded(tokenizer, [{"messages": [U, why]}], "sft", on_bad_row="skip")
    assert [bad[2] for bad in batch.bad] == ["unused_column"]
    assert "'reasoning_content' of message 2" in batch.bad[0][3] and "<think>" in batch.bad[0][3]
    ignored = encoded(
        tokenizer, [{"messages": [U, why]}], "sft", ignore_columns=["reasoning_content"]
    )
    assert ignored.rows == encoded(tokenizer, [{"messages": [U, A]}], "sft").rows
    pair = {"prompt": [U], "chosen": [why], "rejected": [BAD]}
    batch = encoded(tokenizer, [pair], "preference", on_bad_row="skip")
    assert [bad[2] for bad in batch.bad] == ["unused_column"]
    with pytest.raises(BadRow, match="keep one of the two"):
        read({"messages": [U, {**why, "content": "<think>\nA\n</think>\nHello"}]})
    special = [U, {**A, "thinking": f"a {STOP}"}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = KEYED
    batch = encoded(tokenizer, [{"messages": special}], "sft", on_bad_row="skip")
    assert [bad[2] for bad in batch.bad] == ["special_token"]


def test_pretraining_says_that_past_reasoning_is_left_out():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3
    talk = [U, {**A, "content": "<think>\na\n</think>\n\nHello"}, U, A]
    batch = encoded(tokenizer, [{"messages": talk}, {"messages": [U, A, U, A]}], "pretrain")
    assert list(batch.notes.items()) == [
        ("without the reasoning of earlier replies, as the chat template writes them", 1)
    ]


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
