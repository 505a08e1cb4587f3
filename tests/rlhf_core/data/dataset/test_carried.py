"""Answers and extra columns of prompts: kept where the settings name them, and only there."""

from __future__ import annotations

import json
from decimal import Decimal

import pyarrow as pa
import pytest

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.carried import answer_text, extra_text
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.schema import schema
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.data.rows.row import BadRow
from rlhf_core.errors import DataError
from tests.rlhf_core.data.helpers import jsonl, prepared

QUESTIONS = [
    {"question": "2 + 2?", "solution": 4, "more": {"level": 1}},
    {"question": "首都？", "solution": "北京", "more": None},
    {"question": "Name one.", "solution": None, "more": ["a", "😀"]},
]
NAMED = {"prompt": "question", "answer": "solution", "extra": "more"}


def test_named_columns_are_kept(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", QUESTIONS)
    out = prepared(tmp_path / "out", source, "prompts", columns=NAMED)
    assert [row["answer"] for row in out] == ["4", "北京", ""]
    assert [row["extra"] for row in out] == ['{"level": 1}', "", '["a", "😀"]']
    assert [json.loads(row["prompt"])[0]["content"] for row in out] == [
        "2 + 2?", "首都？", "Name one.",
    ]  # fmt: skip
    assert stored_columns(tmp_path / "out") == [
        "prompt_ids", "prompt", "reference", "answer", "extra", "row",
    ]  # fmt: skip


def stored_columns(folder) -> list[str]:
    with pa.OSFile(str(folder / "train-00000.arrow")) as stream:
        return pa.ipc.open_file(stream).schema.names


def test_columns_that_are_not_named_are_not_kept(tmp_path):
    rows = [{"prompt": "2 + 2?", "answer": "4", "extra": {"a": 1}}]
    bare = [{"prompt": "2 + 2?"}]
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), "prompts")
    [same] = prepared(tmp_path / "same", jsonl(tmp_path / "a.jsonl", bare), "prompts")
    assert out["answer"] == out["extra"] == ""  # what older data sets give too
    assert stored_columns(tmp_path / "out") == ["prompt_ids", "prompt", "reference", "row"]
    assert DataCard.load(tmp_path / "out").digest == DataCard.load(tmp_path / "same").digest
    rows = Rows(tmp_path / "out", "train", "prompts")
    assert rows[0] == next(iter(rows)) == out == same
    only = {"answer": "answer"}
    [out] = prepared(tmp_path / "only", jsonl(tmp_path / "a.jsonl", rows_with()), "prompts",
                     columns=only)  # fmt: skip
    assert (out["answer"], out["extra"]) == ("4", "")
    assert "extra" not in stored_columns(tmp_path / "only")


def rows_with() -> list[dict]:
    return [{"prompt": "2 + 2?", "answer": "4", "extra": {"a": 1}}]


def test_other_purposes_and_formats(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Yo"}], "answer": "Yo"}]  # fmt: skip
    source = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"answer": "answer"}
    [out] = prepared(tmp_path / "prompts", source, "prompts", columns=columns)
    assert (out["answer"], out["reference"]) == ("Yo", "Yo")
    [out] = prepared(tmp_path / "sft", source, "sft")
    assert "answer" not in out
    with pytest.raises(DataError, match="answer: answer} has no effect"):
        prepared(tmp_path / "sft", source, "sft", columns=columns)


def test_row_without_the_named_column_or_with_another_type_is_bad(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c", "answer": [1]}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"answer": "answer"}
    with pytest.raises(DataError, match="row 2: there is no column 'answer'"):
        prepared(tmp_path / "out", source, "prompts", columns=columns)
    prepared(tmp_path / "out", source, "prompts", columns=columns, on_bad_row="skip")
    card = DataCard.load(tmp_path / "out")
    assert card.bad == {"missing_column": 1, "wrong_type": 1}
    assert "holds a list; expected a text or a number" in card.bad_rows[1]["message"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x ", "x "), (4, "4"), (0.5, "0.5"), (True, "true"), (None, ""), (float("nan"), ""),
        (Decimal("1.50"), "1.50"), ("", ""), ({"a": 1}, None), (b"x", None), ("\ud800", None),
    ],
)  # fmt: skip
def test_answer_text(value, text):
    if text is None:
        with pytest.raises(BadRow):
            answer_text(value)
    else:
        assert answer_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, None]}, '{"a": [1, null]}'), ('{"a": 1}', '{"a": 1}'), ("[1]", "[1]"),
        ("{a", '"{a"'), ("text", '"text"'), (5, "5"), (None, ""), ("", ""), ("你", '"你"'),
        (float("nan"), None), ({1, 2}, None), ("\ud800", None), ({"a": "\ud800"}, None),
    ],
)  # fmt: skip
def test_extra_text(value, text):
    if text is None:
        with pytest.raises(BadRow):
            extra_text(value)
    else:
        assert extra_text(value) == text
        assert not text or json.loads(text) is not None


def test_tokenised_rows_can_carry_them_too(tmp_path):
    row = {"prompt_ids": [1], "prompt": "[]", "reference": None, "row": 1}
    card = {"source": "made"}
    write_dataset(tmp_path / "a", "prompts", {"train": [{**row, "answer": "4"}]}, card, ("answer",))
    assert Rows(tmp_path / "a", "train")[0]["answer"] == "4"
    with pytest.raises(DataError, match="needs"):
        write_dataset(tmp_path / "b", "prompts", {"train": [{**row, "answer": "4"}]}, card)
    assert schema("prompts").names == ["prompt_ids", "prompt", "reference", "row"]


PAIRS = [
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "rating": 3},
    {"prompt": "3 + 3?", "chosen": "6", "rejected": "7", "rating": 0.5},
]


def test_margins_of_pairs_are_kept_where_they_are_named(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", PAIRS)
    out = prepared(tmp_path / "out", source, "preference", columns={"margin": "rating"})
    assert {row["chosen"]: row["margin"] for row in out} == {"4": 3.0, "6": 0.5}
    bare = prepared(tmp_path / "bare", source, "preference")
    assert all("margin" not in row for row in bare)


@pytest.mark.parametrize("value", (None, "much", True, -1.0, float("nan")))
def test_a_margin_must_be_a_number_of_at_least_0(tmp_path, value):
    source = jsonl(tmp_path / "a.jsonl", [PAIRS[0] | {"rating": value}])
    with pytest.raises(DataError, match=r"column 'margin' holds .*; expected a number of at least"):
        prepared(tmp_path / "out", source, "preference", columns={"margin": "rating"})
