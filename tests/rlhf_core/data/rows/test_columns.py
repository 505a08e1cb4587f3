"""Columns and keys that a format does not read, transcripts in one text, and their refusals."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.prepare import few_notes
from rlhf_core.data.rows.columns import FURTHER, Rules
from rlhf_core.data.rows.formats import normalise
from rlhf_core.data.rows.row import BadRow
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, DataSettings
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl, prepared
from tests.rlhf_core.data.rows.layouts import BAD, SYSTEM, A, U, encoded, read

STOP = "<|im_end|>"
TALK = {"messages": [U, A]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


REFUSED = [
    ({**TALK, "images": ["a.png"]}, "column 'images'", "images, video and audio"),
    ({**TALK, "image": b"\x89PNG"}, "column 'image'", "images, video and audio"),
    ({**TALK, "video": 7}, "column 'video'", "images, video and audio"),
    ({**TALK, "blob": b"\x00"}, "column 'blob'", "part of the conversation"),
    ({**TALK, "image_path": "a.png"}, "column 'image_path'", "images, video and audio"),
    ({**TALK, "audios": [{"bytes": b"x", "path": None}]}, "column 'audios'", "not supported"),
    ({**TALK, "tool_schema": "[{}]"}, "column 'tool_schema'", "columns: {tools: tool_schema}"),
    ({**TALK, "weight": 0.3}, "column 'weight'", "weights 0 and 1"),
    ({**TALK, "sample_weight": "0"}, "column 'sample_weight'", "weights 0 and 1"),
    ({**TALK, "loss_mask": [0, 1]}, "column 'loss_mask'", "weights 0 and 1"),
    ({**TALK, "train": False}, "column 'train'", "weights 0 and 1"),
    ({**TALK, "history": [["a", "b"]]}, "column 'history'", "belongs to the prompt"),
    ({**TALK, "rejected": "No"}, "column 'rejected'", "chosen and rejected"),
    ({**TALK, "label": "good"}, "column 'label'", "true or false"),
    ({**TALK, "label": -1}, "column 'label'", "true or false"),
    ({**TALK, "prompt": "Something else"}, "column 'prompt'", "belongs to the prompt"),
    ({**TALK, "enable_thinking": False}, "column 'enable_thinking'", "template"),
    ({**TALK, "chat_template_kwargs": {"a": 1}}, "column 'chat_template_kwargs'", "template"),
    ({**TALK, "turns_before": [{"a": 1}]}, "column 'turns_before'", "part of the conversation"),
    ({**TALK, "character": "pirate"}, "column 'character'", "columns: {system: character}"),
    ({"instruction": "a", "context": "c", "output": "b"}, "column 'context'", "input: context}"),
    ({"prompt": "a", "completion": "b", "choices": ["x"]}, "column 'choices'", "prompt's text"),
    ({"prompt": "a", "input": "x", "completion": "b"}, "column 'input'", "prompt's text"),
    ({"text": "a", "role": "prompter"}, "column 'role'", "columns: {system: role}"),
    ({"messages": [{**U, "reasoning_content": "r"}, A]}, "key 'reasoning_content'", "<think>"),
    ({"messages": [U, {**A, "thinking": ["r"]}]}, "key 'thinking' of message 2", "<think>"),
    ({"messages": [U, {**A, "reasoning_content": "r", "cot": "s"}]}, "key 'cot'", "<think>"),
    ({**TALK, "reasoning_content": "r"}, "column 'reasoning_content'", "<think>"),
    ({"messages": [{**U, "name": "Bob"}, A]}, "key 'name' of message 1", "speakers"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "key 'weight' of message 2", "expected 1"),
    ({"messages": [{**U, "train": True}, A]}, "key 'train' of message 1", "only replies"),
    ({"messages": [U, {**A, "loss_weight": 0}]}, "key 'loss_weight' of", "weights 0 and 1"),
    ({"messages": [U, {**A, "ignore_loss": True}]}, "key 'ignore_loss' of", "weights 0 and 1"),
    ({"messages": [U, {**A, "do_train": False}]}, "key 'do_train' of", "weights 0 and 1"),
    ({"messages": [U, {**A, "prefix": True}]}, "key 'prefix' of message 2", "only begun"),
    ({"messages": [U, {**A, "summary_of_it": "s"}]}, "key 'summary_of_it'", "message's text"),
    ({**TALK, "no_loss": "true"}, "column 'no_loss'", "weights 0 and 1"),
    ({**TALK, "is_bad": True}, "column 'is_bad'", "take such rows out"),
    ({**TALK, "is_correct": 0}, "column 'is_correct'", "columns: {label: is_correct}"),
    ({**TALK, "style": "formal"}, "column 'style'", "part of the conversation"),
    ({**TALK, "target_language": "French"}, "column 'target_language'", "prompt's text"),
    ({"prompt": "a", "code": "x = 1", "completion": "b"}, "column 'code'", "prompt's text"),
    ({"prompt": "a", "sys": "s", "completion": "b"}, "column 'sys'", "columns: {system: sys}"),
    ({"prompt": "a", "explanation": "s", "completion": "b"}, "column 'explanation'", "<think>"),
    ({"messages": [U, {**A, "images": ["x"]}]}, "key 'images' of message 2", "not supported"),
    ({**TALK, "system": "a", "system_prompt": "b"}, "column 'system_prompt'", "system"),
    ({"system": "a", "messages": [{"role": "system", "content": "b"}, U, A]}, "column 'system'",
     "two different system messages"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "todo"), REFUSED)
def test_what_changes_the_meaning_of_a_row_is_refused_by_name(row, name, todo):
    with pytest.raises(BadRow) as error:
        read(row)
    unsupported = todo in ("images, video and audio", "template", "not supported") or "tool" in name
    assert error.value.reason == ("unsupported" if unsupported else "unused_column")
    assert name in error.value.message and todo in error.value.message, error.value.message
    column = name.split("'")[1]
    if "expected 1" not in todo and "two different" not in todo:
        assert f"ignore_columns: [{column}" in error.value.message
    if column not in ("input", "context"):
        read(row, ignore_columns=[column])  # does not raise


def test_context_that_the_prompt_quotes_is_no_loss():
    passage = "Paris is the capital of France."
    row = {"prompt": f"Read this. {passage} What is the capital?", "completion": "Paris"}
    assert read({**row, "context": passage})[1] == {}
    for other in ("Rome is the capital of Italy.", "Paris"):
        with pytest.raises(BadRow, match="column 'context'"):
            read({**row, "context": other})
    with pytest.raises(BadRow, match="column 'context'"):  # the reply does not tell the model
        read({"prompt": "What is the capital?", "completion": passage, "context": passage})


def test_label_without_a_reply_is_metadata():
    for row in ({"text": "a", "label": 3}, {"prompt": "a", "label": "maths"}):
        assert read(row, "prompts")[1] == {"column 'label' not used": 1}


def test_messages_and_empty_lists_of_a_table_are_read_from_their_text():
    row = {"messages": json.dumps([U, A]), "images": "[]", "tools": "null", "history": "[]"}
    assert read(row)[0] == read(TALK)[0]
    pair = {"prompt": json.dumps([U]), "chosen": json.dumps([A]), "rejected": json.dumps(BAD)}
    assert (read(pair, "preference")[0].chosen, read(pair)[0].rejected) == ("Hello", "Go away")


@pytest.mark.parametrize(
    ("given", "words"),
    [({"split": "test"}, "split (test) has no effect"), ({"subset": "math"}, "subset (math) has"),
     ({"revision": "v1"}, "revision (v1) has"),
     ({"system": "Be kind.", "format": "text"}, "system has no effect on plain text")],
)  # fmt: skip
def test_setting_without_effect_is_an_error(tmp_path, given, words):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    [problem] = check_source(DataSettings(source=source, **given), "sft")
    assert words in problem
    # A preset names a language of its built-in set, and the user another source.
    assert check_source(DataSettings(source=source, subset="english"), "sft") == []


def test_unknown_metadata_is_read_past_and_counted(tokenizer):
    row = {**TALK, "id": 7, "source": "web", "created": "2024-01-01", "is_good": True,
           "metadata": {"a": 1}, "views": 3.5,
           "opened": datetime.date(2024, 1, 1), "ok": Decimal(1), "num_images": None,
           "image_count": "0", "created_at": "May", "vector": [0.5, 1],
           "prompt_name": "p", "output_format": "md", "is_bad": False, "valid": 1}  # fmt: skip
    row["messages"] = [{**U, "timestamp": 5, "weight": None}, {**A, "language": "en", "weight": 1}]
    empty = {**TALK, "id": None, "images": [], "tools": None, "system": "", "history": [[]],
             "weight": 1, "label": None, "no_loss": False}  # fmt: skip
    batch = encoded(tokenizer, [row, row, empty], "sft")
    assert batch.bad == []
    unread = ["id", "source", "created", "is_good", "metadata", "views", "opened", "ok",
              "image_count", "created_at", "vector", "prompt_name", "output_format",
              "is_bad", "valid"]  # fmt: skip
    assert batch.notes == {
        **{f"column '{name}' not used": 2 for name in unread},
        **{f"key '{name}' not used": 2 for name in ("timestamp", "language")},
    }


def test_ignored_columns_are_counted_and_leave_the_reading_as_it_is(tokenizer):
    row = {"messages": [U, {**A, "reasoning_content": "r"}], "images": ["x"], "system": "Be cruel."}
    batch = encoded(tokenizer, [row], "sft",
                    ignore_columns=["images", "reasoning_content", "system"])  # fmt: skip
    [plain] = encoded(tokenizer, [TALK], "sft").rows.to_pylist()
    assert batch.rows.to_pylist() == [plain]
    assert set(batch.notes) == {
        f"{name} ignored (ignore_columns)"
        for name in ("column 'images'", "column 'system'", "key 'reasoning_content'")
    }


def test_an_ignored_column_is_not_read_where_the_format_would_read_it():
    row = {"prompt": "Something else", "chosen": [U, A], "rejected": [U, BAD]}
    with pytest.raises(BadRow, match="does not contain the prompt"):
        read(row, "preference")
    example, notes = read(row, "preference", ignore_columns=["prompt"])
    assert (example.messages, example.chosen) == ([U], "Hello")
    assert notes == {"column 'prompt' ignored (ignore_columns)": 1}


def test_notes_of_endless_names_stay_few():
    rules = Rules("sft")
    for number in range(500):
        normalise({**TALK, f"name_{number}_x": 1}, "messages", "sft", rules)
    assert len(rules.notes) < 110 and sum(rules.notes.values()) == 500
    whole = few_notes(Counter({FURTHER: 1} | {f"name {number}": 2 for number in range(300)}))
    assert len(whole) == 201 and whole[FURTHER] == 2 * 100 + 1, "each row counts once"


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"a": "s", "instruction": "i", "output": "o"}, {"sys": "a"},
         ["format alpaca reads no column 'sys', only instruction, input"]),
        ({"a": [U, A]}, {"messages": "a", "prompt": "a"}, ["messages reads no column 'prompt'"]),
        ({"a": [U, A], "b": "4"}, {"messages": "a", "answer": "b"}, ["no column 'answer'"]),
    ],
)  # fmt: skip
def test_name_in_columns_without_effect_is_an_error(row, columns, words):
    for format in ("auto", "messages" if "messages" in columns else "alpaca"):
        with pytest.raises(DataError) as error:
            read(row, columns=columns, format=format)
        assert all(word in str(error.value) for word in words), error.value
    if "sys" in columns:
        example, _ = read(row, columns={"system": "a"})
        assert example.messages[0] == {"role": "system", "content": "s"}


TRANSCRIPTS = [
    ({"prompt": "a", "chosen": "b\n\nHuman: c\n\nAssistant: d", "rejected": "e"}, "preference"),
    ({"prompt": "a", "completion": "Human: b\nAssistant: c"}, "sft"),
    ({"prompt": "a", "completion": "b\nHuman: c\nAssistant: d"}, "sft"),
    ({"prompt": "USER: a ASSISTANT:", "completion": "c"}, "sft"),
    ({"prompt": "a", "completion": "b\nUser: c\nAssistant: d"}, "sft"),
    ({"prompt": "a", "completion": "b\n### User: c\n### Assistant: d"}, "sft"),
    ({"instruction": "Human: a\nAssistant:b\nHuman: c\nAssistant:", "output": "d"}, "sft"),
    ({"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "d"}, "sft"),
    ({"prompt": "Talk.\n[|Human|] a\n[|AI|] b\n[|Human|]"}, "prompts"),
    ({"messages": [{**U, "content": "User: a\nAssistant:"}, A]}, "sft"),
    ({"prompt": "\n\nHuman: a", "chosen": "\n\nAssistant: b", "rejected": "c"}, "preference"),
    ({"prompt": "a", "completion": "### Response:\nb"}, "sft"),
    ({"prompt": f"<|im_start|>user\na{STOP}\n<|im_start|>assistant\n", "completion": "b"}, "sft"),
    ({"messages": [U, {**A, "content": "<start_of_turn>user\na"}]}, "sft"),
    ({"instruction": "a", "output": "b\n### Instruction:\nc\n### Response:\nd"}, "sft"),
    ({"text": "### Instruction:\na\n\n### Response:\nb"}, "sft"),
    (
        {
            "prompt": "A prompt of some length: ",
            "chosen": "A prompt of some length: a",
            "rejected": "A prompt of some length: b",
        },
        "preference",
    ),
    ({"instruction": "a", "output": "[INST] b [/INST] c"}, "sft"),
    ({"text": f"<|im_start|>user\na{STOP}\n<|im_start|>assistant\nb{STOP}"}, "sft"),
    ({"text": "### Human: a### Assistant: b"}, "sft"),
    ({"text": "\n\nHuman: a\n\nAssistant:"}, "prompts"),
]


@pytest.mark.parametrize(("row", "purpose"), TRANSCRIPTS)
def test_transcript_in_one_text_is_refused(row, purpose):
    with pytest.raises(BadRow) as error:
        read(row, purpose)
    assert error.value.reason == "transcript"
    words = ("write it as messages", "implicit", "remove it from the reply")
    assert any(word in error.value.message for word in words)


@pytest.mark.parametrize(
    "text",
    ["Humans: all of us\nAssistants help.", "The User: a class.\nIn short.", "a < b",
     "Use `<image>` in SVG", "<image>x</image>", "print('<|x|>')", "A dialogue:\nUser: hello",
     "<img src='a.png'>", "pad <image_count>", "AI: what machines do.", "An assistant: a helper"],
)  # fmt: skip
def test_text_that_only_looks_like_a_transcript_is_read(text):
    example, _ = read({"prompt": text, "completion": text})
    assert [m["content"] for m in example.messages] == [text, text]


@pytest.mark.parametrize("text", ["<image>What is it?", "Tell me:\n<video>", "<audio>\nWho?",
    "<|image_1|>\nWhat?", "<|vision_start|><|image_pad|><|vision_end|>What?", "<image_0> What?",
    "Picture 1: <img>a.jpg</img>\nWhat?", "<|image|>What?", "<IMAGE>What?"])  # fmt: skip
def test_placeholder_of_a_file_is_refused(text):
    with pytest.raises(BadRow, match="stands for a file"):
        read({"prompt": text, "completion": "a"})


@pytest.mark.parametrize(
    ("row", "purpose", "words"),
    [
        ({"question": "a", "answer": "b"}, "sft",
         ['set columns: {"prompt": "question", "completion": "answer"}']),
        ({"question": "a", "answer": "b"}, "prompts",
         ['set columns: {"prompt": "question", "answer": "answer"}']),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "preference",
         ['set columns: {"prompt": "question"}', "implicit_prompt"]),
        ({"question": "a", "response_j": "b", "response_k": "c"}, "preference",
         ['{"prompt": "question", "chosen": "response_j", "rejected": "response_k"}']),
        ({"prompt": "a", "solution": "b"}, "sft", ['set columns: {"completion": "solution"}']),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "sft", ["stepwise", "unpaired"]),
        ({"text": "a", "summary": "b"}, "sft",
         ['columns: {"prompt": "text", "completion": "summary"}', "ignore_columns: [summary]"]),
        ({"prompt": {"text": "a", "replies": []}}, "prompts", ["tree of messages", "path"]),
        ({"instruction": "a", "instances": [{}]}, "sft", ["Self-Instruct", "instruction, input"]),
        ({**TALK}, "unpaired", ["unpaired (prompt, completion, label)"]),
        ({"messages": [{**U, "tool_calls": [{"name": "f"}]}, A]}, "sft",
         ["key 'tool_calls' of message 1", "calls from tool_calls of a reply"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "sft",
         ["part 1 of message 1", "'image_url'; only text"]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "sft",
         ["part 1 of message 1", "has no text"]),
        ({"messages": [U, A, U], "chosen": [U, A], "rejected": [U, BAD]}, "preference",
         ["does not contain the prompt", "'messages'"]),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "sft",
         ["entry 1 of column 'history'", "a question and its answer"]),
        ({"prompt": "[{'role': 'user', 'content': 'a'}]"}, "prompts",
         ["holds messages as a text that is not JSON", "json.dumps"]),
        ({"prompt": [{"role": "system", "content": "x"}, U], "chosen": [SYSTEM, U, A],
          "rejected": [SYSTEM, U, BAD]}, "preference", ["'chosen' and the prompt hold different"]),
        ({"prompt": "a", "chosen": {**A, "weight": 0}, "rejected": "c"}, "preference",
         ["'chosen' has the weight 0"]),
    ],
)  # fmt: skip
def test_refusal_says_what_to_do(row, purpose, words):
    with pytest.raises((BadRow, DataError)) as error:
        read(row, purpose)
    text = getattr(error.value, "message", str(error.value))
    assert all(word in text for word in words), text


def test_an_empty_list_of_ignored_columns_is_not_in_the_key():
    plain = job("a.jsonl")
    assert "ignore_columns" not in plain.key_settings()
    ignoring = DataJob(**plain.model_dump() | {"ignore_columns": ["id"]})
    assert ignoring.key_settings()["ignore_columns"] == ["id"]


def test_an_ignored_name_that_no_row_has_is_an_error(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "cost": "1"}]
    rows = [{"messages": talk}, {"messages": json.dumps([*talk[:1], talk[1] | {"mood": "x"}])}]
    rows.append({"messages": talk, "images": ["x"]})  # in this row alone
    source = jsonl(tmp_path / "a.jsonl", rows)
    names = ["cost", "mood", "images"]
    assert len(prepared(tmp_path / "out", source, ignore_columns=names, deduplicate=False)) == 3
    with pytest.raises(DataError, match=r"ignore_columns: \[image\] has no effect: no row has"):
        prepared(tmp_path / "out", source, ignore_columns=[*names, "image"])
