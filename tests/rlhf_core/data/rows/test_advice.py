"""Layouts that no format reads: the setting that the error names reads them, or it says what to
write instead."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rlhf_core.data.rows.row import BadRow
from rlhf_core.errors import DataError
from tests.rlhf_core.data.rows.layouts import BAD, SYSTEM, A, G, H, U, read

S, C, R = "Be kind.", "Hello", "Go away"


def refusal(row: Any, purpose: str, **given: Any) -> str:
    with pytest.raises((BadRow, DataError)) as error:
        read(row, purpose, **given)
    return str(getattr(error.value, "message", error.value))


# (purpose, row, text of the system message and the question, replies)
NAMED: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("sft", {"system_prompt": S, "question": "Hi", "response": C}, [S, "Hi"], [C]),
    ("sft", {"system": S, "query": "Hi", "response": C, "history": []}, [S, "Hi"], [C]),
    ("sft", {"question": "Hi", "answer": C}, ["Hi"], [C]),
    ("sft", {"problem": "Hi", "solution": C, "answer": "4"}, ["Hi"], [C]),
    ("sft", {"inputs": "Hi", "targets": C}, ["Hi"], [C]),
    ("sft", {"input": "Hi", "target": C}, ["Hi"], [C]),
    ("sft", {"article": "Hi", "summary": C}, ["Hi"], [C]),
    ("sft", {"human": "Hi", "bot": C}, ["Hi"], [C]),
    ("sft", {"INSTRUCTION": "Hi", "RESPONSE": C}, ["Hi"], [C]),
    ("sft", {"Instruction": "Hi", "Input": "", "Output": C}, ["Hi"], [C]),
    ("sft", {"Question": "Hi", "Answer": C}, ["Hi"], [C]),
    ("sft", {"context": "ctx", "question": "Hi", "answer": C}, ["Hi\n\nctx"], [C]),
    ("sft", {"context": [U], "response": C, "language": "en"}, ["Hi"], [C]),
    ("sft", {"items": [H, G]}, ["Hi"], [C]),
    ("sft", {"prompt": "Hi", "chosen_response": C, "rejected_response": R}, ["Hi"], [C, R]),
    ("prompts", {"question": "Hi", "answer": "4"}, ["Hi"], []),
    ("prompts", {"items": [H, G]}, ["Hi"], [C]),
    ("prompts", {"chosen_conversations": [U, A], "rejected_conversations": [U, BAD]}, ["Hi"],
     [C, R]),
    ("prompts", {"context_messages": [SYSTEM, U], "label": "4"}, [S, "Hi"], []),
    ("prompts", {"context": "ctx", "question": "Hi"}, ["Hi\n\nctx"], []),
    ("preference", {"system": S, "question": "Hi", "chosen": C, "rejected": R}, [S, "Hi"], [C, R]),
    ("preference", {"question": "Hi", "response_j": C, "response_k": R}, ["Hi"], [C, R]),
    ("preference", {"prompt": "Hi", "pos_resp": C, "neg_resp": R}, ["Hi"], [C, R]),
    ("preference", {"chosen_conversations": [U, A], "rejected_conversations": [U, BAD]}, ["Hi"],
     [C, R]),
    ("preference", {"messages": [U], "chosen_response": A, "rejected_response": BAD}, ["Hi"],
     [C, R]),
    ("preference", {"talk": [U], "chosen_response": A, "rejected_response": BAD}, ["Hi"], [C, R]),
    ("unpaired", {"prompt": "Hi", "response": C, "is_correct": True}, ["Hi"], [C]),
    ("unpaired", {"question": "Hi", "answer": C, "thumbs_up": 1.0}, ["Hi"], [C]),
]  # fmt: skip


@pytest.mark.parametrize(("purpose", "row", "prompt", "replies"), NAMED)
def test_the_setting_that_the_error_names_reads_the_rows(purpose, row, prompt, replies):
    text = refusal(row, purpose)
    columns = json.loads(re.search(r"set columns: (\{.*?\})\. ", text)[1])
    example, _ = read(row, purpose, columns=columns)
    said = [m["content"] for m in example.messages if m["role"] == "assistant"]
    assert [m["content"] for m in example.messages if m["role"] != "assistant"] == prompt
    assert said + [m["content"] for m in example.replies] == replies


WRITTEN = [
    ("preference", {"prompt": "Hi", "response_0": C, "response_1": R, "better_response_id": 0},
     "'response_0' and 'response_1' may be two replies: write the better one as chosen"),
    ("preference", {"history": "Hi", "human_ref_A": C, "human_ref_B": R, "labels": 1},
     "'human_ref_A' and 'human_ref_B' may be two replies"),
    ("preference", {"context": [U], "response1": C, "response2": R}, "may be two replies"),
    ("sft", {"conversation_a": [U, A], "conversation_b": [U, BAD], "winner": "model_a"},
     "may be two replies"),
    ("sft", {"prompt": "Hi", "answers": [{"answer": C, "rank": 1}]}, "may hold several replies"),
    ("sft", {"prompt;completion": "Hi;Hello"}, "separates its columns by ';'"),
    ("sft", {"prompt": {"0": "Hi", "1": "b"}, "completion": {"0": C, "1": R}}, "orient='records'"),
    ("sft", {"data": [{"instruction": "Hi", "output": C}]}, "write the list alone as the file"),
    ("sft", {"version": "1", "rows": [{"messages": [U, A]}]}, "write the list alone as the file"),
    ("sft", {"data": ["Hi", "Hello"]}, "roles user and assistant in turn"),
    ("sft", {"conversations": ["Hi", "Hello"]}, "give each its role"),
    ("sft", {"conversations": {"from": ["human", "gpt"], "value": ["Hi", C]}}, "object of lists"),
    ("prompts", {"prompt": '["Hi", "And \\"now\\"?"]'}, "list of texts, written as one text"),
    ("prompts", {"prompt": "Hi", "test_cases": [{"a": 1}]}, "columns: {extra: test_cases}"),
    ("sft", {"conversation": [{"input": "Hi", "output": C}]}, "write two messages"),
    ("sft", {"instruction": "Hi", "output": [C, R]}, "a list of 2 texts; expected one reply"),
    ("sft", {"body": {"messages": [U, A]}}, "'body' holds an object; write what it holds"),
    ("preference", {"input": {"messages": [U]}, "preferred_output": [A],
                    "non_preferred_output": [BAD]}, "'input' holds an object; write what it holds"),
    ("unpaired", {"prompt": "Hi", "chosen": C, "rejected": R}, "leave data.unpaired empty"),
    ("unpaired", {"messages": [U, A]}, "needs a label"),
    ("sft", {"system": "SYSTEM: You have functions.", "chat":
             "USER: Hi\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\nFUNCTION RESPONSE: 3"},
     "'chat' holds 'USER:' and may be a conversation in one text: write it as messages"),
    ("preference", {"messages": [U, A]}, "{source: sampled} makes pairs"),
    ("preference", {"a": "b"}, 'columns: {"prompt": "question", "chosen": "good", "rejected"'),
    ("sft", {"prompt": "Hi", "question": "b", "completion": C},
     "columns: {instruction: <the prompt's column>, input: question}"),
]  # fmt: skip


@pytest.mark.parametrize(("purpose", "row", "words"), WRITTEN)
def test_layout_that_no_setting_reads_is_refused_with_what_to_write(purpose, row, words):
    assert words in refusal(row, purpose)


def test_object_of_many_levels_is_refused_like_others():
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert "no format has the columns 'a'" in refusal(deep, "sft")


def test_only_formats_of_the_purpose_are_listed():
    text = refusal({"a": "b"}, "preference")
    assert "The formats for preference are hh (chosen, rejected" in text and "alpaca" not in text


def test_a_renamed_column_does_not_hide_one_of_the_same_name():
    row = {"prompt": "Be brief.", "question": "Hi", "answer": C}
    columns = {"prompt": "question", "completion": "answer"}
    assert "hides the file's own column 'prompt'" in refusal(row, "sft", columns=columns)
    read(row | {"prompt": "Hi"}, columns=columns)
    read(row | {"prompt": None}, columns=columns)
    example, _ = read(row, columns=columns | {"system": "prompt"})
    assert [m["content"] for m in example.messages] == ["Be brief.", "Hi", C]
