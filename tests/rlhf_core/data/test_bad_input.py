"""Bad input: each case names the file, the row and what to do, or is counted with skip."""

import gzip
import json

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.prepare import prepare
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl, prepared

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def talk(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROWS = [
    (b'{"messages": [', "malformed_json", "malformed JSON at column 15"),
    (b'{"messages": "\xff"}', "invalid_utf8", "byte 15 of the line (0xff) is not UTF-8"),
    (b'{"messages": "\\ud800"}', "wrong_type", "holds a str; expected a list"),
    (talk(("user", "\ud83d"), ("assistant", "b")), "invalid_utf8", "lone surrogate"),
    ([1, 2], "not_an_object", "a JSON list; expected an object"),
    (b'{"messages": [], "a": {"b": 1, "b": 2}}', "double_key", "the key 'b' appears twice"),
    (b'{"messages": ' + b"[" * 9999 + b"]" * 9999 + b"}", "malformed_json", "nested too deeply"),
    (b'{"messages": ' + b"9" * 5000 + b"}", "malformed_json", "a number has thousands of digits"),
    ({"text": "x"}, "missing_column", "no column 'messages'; the row has 'text'"),
    ({"messages": []}, "no_text", "'messages' is an empty list"),
    ({"messages": None}, "wrong_type", "holds null"),
    ({"messages": ["a"]}, "wrong_type", "message 1 of column 'messages' is a str"),
    (talk(("user", ""), ("assistant", "b")), "no_text", "message 1 of column 'messages' is empty"),
    (talk(("user", "a"), ("assistant", " \n")), "no_text", "message 2"),
    (talk(("user", "a")), "nothing_to_train", "no assistant message"),
    (talk(("system", "a")), "no_text", "no user message"),
    (talk(("assistant", "a"), ("user", "b")), "role_order", "starts with the assistant"),
    (talk(("wizard", "a")), "unknown_role", "role 'wizard'; expected one of system, user"),
    (talk(("user", "a"), ("assistant", "b<|im_end|>c")), "special_token", "contains '<|im_end|>'"),
    (
        {"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        "wrong_type", "call 1 of key 'tool_calls' of message 2 of column 'messages' is 'id'",
    ),
]  # fmt: skip


def escaped(row):
    return json.dumps(row).encode() if isinstance(row, dict) else row


@pytest.mark.parametrize(("row", "reason", "text"), ROWS, ids=[f"{r[1]}-{i}" for i, r in enumerate(ROWS)])  # fmt: skip  # noqa: E501
def test_bad_row_names_file_row_and_what_to_do(tmp_path, row, reason, text):
    source = jsonl(tmp_path / "a.jsonl", [GOOD, b"", escaped(row), GOOD])
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "out", source)
    assert f"{source}, row 3: " in str(error.value)
    assert text in str(error.value)
    assert "set on_bad_row: skip" in str(error.value)


@pytest.mark.parametrize(("row", "reason", "text"), ROWS, ids=[f"{r[1]}-{i}" for i, r in enumerate(ROWS)])  # fmt: skip  # noqa: E501
def test_bad_row_is_counted_and_listed_when_skipped(tmp_path, row, reason, text):
    source = jsonl(tmp_path / "a.jsonl", [escaped(row), GOOD])
    if reason == "missing_column":
        source = jsonl(tmp_path / "a.jsonl", [GOOD, escaped(row)])
    out = prepared(tmp_path / "out", source, on_bad_row="skip", format="messages")
    card = DataCard.load(tmp_path / "out")
    assert (len(out), card.read, card.kept, card.bad) == (1, 2, 1, {reason: 1})
    [listed] = card.bad_rows
    assert (listed["file"], listed["reason"]) == (source, reason)
    assert text in listed["message"]
    assert text in (tmp_path / "out" / "card.md").read_text()


PAIRS = [
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
     "the prompts of chosen and rejected differ at turn 1"),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     "turn 2 of column 'chosen' is empty"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a"},
     "'chosen' does not end with a reply"),
    ({"chosen": "hello \n\nHuman: a", "rejected": "x"}, "expected a transcript that starts"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' holds a int; expected text"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "column 'rejected' is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text"), PAIRS)
def test_bad_pair_is_refused(tmp_path, row, text):
    source = jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "out", source, "preference")
    assert f"{source}, row 1: " in str(error.value)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        *((row, f"'label' holds {found}; expected true or false")
          for row, found in (({"label": None}, "null"), ({"label": 3}, "3"),
                             ({"label": 0.5}, "0.5"), ({"label": "good"}, "'good'"),
                             ({"label": ""}, "''"), ({"label": [True]}, "[True]"))),
        ({}, "there is no column 'label'"),
        ({"label": True, "completion": ""}, "column 'completion' is empty"),
        ({"label": True, "completion": 3}, "'completion' holds a int; expected text"),
        ({"label": True, "completion": [{"role": "user", "content": "a"}]},
         "'completion' does not end with a reply"),
        ({"label": True, "prompt": None}, "column 'prompt' is null"),
    ],
)  # fmt: skip
def test_bad_label_or_reply_is_refused(tmp_path, row, text):
    good = {"prompt": "a", "completion": "b", "label": True}
    bad = {"prompt": "c", "completion": "d", **row}
    source = jsonl(tmp_path / "a.jsonl", [good, bad])
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "out", source, "unpaired")
    assert f"{source}, row 2: " in str(error.value)
    assert text in str(error.value)
    assert any(text in problem for problem in check_source(DataSettings(source=source), "unpaired"))


def test_bad_label_in_the_first_row_is_named_too(tmp_path):
    row = {"prompt": "a", "completion": "b", "label": "good"}
    source = jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"row 1: column 'label' holds 'good'"):
        prepared(tmp_path / "out", source, "unpaired")


def test_every_row_is_accounted_for(tmp_path):
    long = talk(("user", "long"), ("assistant", "word " * 400))
    rows = [GOOD, GOOD, long, b"{", talk(("user", "q")), talk(("user", "c"), ("assistant", "d"))]
    source = jsonl(tmp_path / "a.jsonl", rows)
    out = prepared(tmp_path / "out", source, on_bad_row="skip", max_length=100, max_samples=1)
    card = DataCard.load(tmp_path / "out")
    assert len(out) == 1
    assert (card.read, card.kept) == (6, 1)
    assert card.dropped == {"too_long": 1, "duplicate": 1, "max_samples": 1}
    assert card.bad == {"malformed_json": 1, "nothing_to_train": 1}
    assert [(r["row"], r["reason"]) for r in card.bad_rows] == [
        (4, "malformed_json"), (5, "nothing_to_train"),
    ]  # fmt: skip


def test_identical_pair_is_dropped_and_counted(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"},
            {"prompt": "a", "chosen": "b", "rejected": "c"}]  # fmt: skip
    assert len(prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), "preference")) == 1
    assert DataCard.load(tmp_path / "out").dropped == {"identical_replies": 1}


def test_long_prompt_is_dropped_and_counted(tmp_path):
    rows = [talk(("user", "word " * 50), ("assistant", "b")), GOOD]
    source = jsonl(tmp_path / "a.jsonl", rows)
    assert len(prepared(tmp_path / "out", source, max_prompt_length=40)) == 1
    assert DataCard.load(tmp_path / "out").dropped == {"prompt_too_long": 1}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere/a.jsonl", ["no such file or folder", "correct the path"]),
        ("builtin:nope", ["no built-in data set 'nope'", "builtin:chatterbot"]),
        ("ftp://x/y", ["ftp:// URLs are not supported"]),
        ("gs://b/x.jsonl", ["gs:// URLs are for the store", "gcloud storage cp"]),
        ("", ["is empty", "Hugging Face dataset id"]),
        ("file://", ["is empty"]),
        ("/" + "a" * 300 + ".jsonl", ["no such file or folder"]),
        ("~no-such-user/a.jsonl", ["home directory", "Give the whole path"]),
        ("/dev/null", ["neither a regular file nor a folder"]),
    ],
)
def test_missing_source_says_what_is_needed(tmp_path, source, words):
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "out", source)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", b"hello", ["unknown file type", ".jsonl.gz, .parquet, .csv, .txt and .md"]),
        ("a.jsonl", b"", ["is empty", "no rows"]),
        ("a.json", b"[]", ["is empty", "no rows"]),
        ("a.json", b'[{"prompt": "a"}, {"prompt": ', ["row 2: malformed JSON", ".jsonl"]),
        ("a.json", b'[{"prompt": "a"} {"prompt": "b"}]', ["row 1: malformed JSON", "','"]),
        ("a.json", b'[{"prompt": "a"}', ["is truncated"]),
        ("a.csv", b'a,a\n1,2\n', ["repeats a column"]),
        ("a.csv", b'prompt\n"open', ["row 1: not CSV"]),
        ("a.csv", b'prompt,x\na\n', ["row 1: the row has 1 fields, the header has 2"]),
        ("a.parquet", b"version https://git-lfs", ["not readable as Parquet", "git-lfs"]),
        ("a.parquet", POINTER, ["is a git-lfs pointer", "git lfs pull"]),
        ("a.jsonl.gz", POINTER, ["is a git-lfs pointer", "git lfs pull"]),
        ("a.txt", POINTER, ["is a git-lfs pointer", "git lfs pull"]),
        ("a.txt", b"", ["row 1: the file is empty", "add text or remove the file"]),
        ("a.md", b"\xef\xbb\xbf \n\n", ["row 1: the file is empty"]),
        ("a.txt", b"Hi\ncaf\xe9\n", ["row 1: line 2 of the file holds a byte (0xe9)", "iconv -f"]),
        ("a.txt", "Hi".encode("utf-16"), ["line 1 of the file holds a byte (0xff)"]),
        ("a.txt", "a\nb".encode("utf-16-le"), ["line 1 of the file holds a zero byte", "UTF-16"]),
        ("a.txt.gz", b"no gzip", ["gzip data is damaged", "after row 0"]),
        ("a.jsonl.gz", b"no gzip", ["gzip data is damaged", "after row 0"]),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9000)[:-30], ["damaged or truncated"]),
        ("a.jsonl", b'[\n {"prompt": "a"}\n]', ["row 1: malformed JSON: the line is only '['"]),
        ("a.jsonl", b'[{"prompt": "a"}]', ["the whole table, rename the file to .json"]),
        ("a.jsonl", b'{"question": "a"}\n', ["no format has the columns 'question'", "alpaca"]),
    ],
)  # fmt: skip
def test_damaged_file_says_where_and_what(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "out", str(path), "prompts")
    assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    found = check_source(DataSettings(source=str(path)), "prompts")
    if "cut short" not in words[0] and not (name.endswith(".gz") and len(content) > 100):
        assert found and str(path) in found[0]


def test_invalid_utf8_in_an_array_is_one_bad_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"prompt": "a"}, {"prompt": "\xff"}, {"prompt": "c"}]')
    with pytest.raises(DataError, match=r"a.json, row 2: .*not UTF-8"):
        prepared(tmp_path / "out", str(path), "prompts")
    assert len(prepared(tmp_path / "out", str(path), "prompts", on_bad_row="skip")) == 2


def test_all_filtered_says_what_filtered(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"1 were read.*1 too_long.*[Rr]aise max_length \(now 3\)"):
        prepared(tmp_path / "out", source, max_length=3)
    with pytest.raises(DataError, match=r"1 are held out.*heldout_fraction"):
        prepare(job(source, heldout_fraction=0.9999), byte_tokenizer(), tmp_path / "out")


def test_only_unreadable_rows_are_an_error_even_when_skipped(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [b"{", b"["])
    with pytest.raises(DataError, match=r"none of its 2 rows can be read.*row 2.*malformed"):
        prepared(tmp_path / "out", source, on_bad_row="skip")


def test_renamed_column_that_is_missing(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"q": "a"}])
    with pytest.raises(DataError, match="no column 'question' to use as 'prompt'"):
        prepared(tmp_path / "out", source, "prompts", columns={"prompt": "question"})


def test_check_source_names_the_first_bad_row_and_is_quiet_otherwise(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [GOOD] * 3)
    assert check_source(DataSettings(source=good), "sft") == []
    bad = jsonl(tmp_path / "bad.jsonl", [GOOD, {"text": "a"}])
    [problem] = check_source(DataSettings(source=bad), "sft")
    assert f"{bad}, row 2: there is no column 'messages'" in problem
    assert check_source(DataSettings(source=bad, on_bad_row="skip"), "sft") == []
    [problem] = check_source(DataSettings(source=good), "preference")
    assert "can be used for sft" in problem


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"instruction": "a", "input": "b\ud800", "output": "c"}, "input"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
          "system": "\udfff"}, "system"),
    ],
)  # fmt: skip
def test_half_a_character_in_an_optional_column_is_a_bad_row(tmp_path, row, column):
    source = jsonl(tmp_path / "a.jsonl", [json.dumps(row).encode()])
    with pytest.raises(DataError, match=f"row 1: column '{column}' holds half a character"):
        prepared(tmp_path / "out", source)


def test_double_key_in_an_array_is_one_bad_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}, {"prompt": "d"}]')
    assert len(prepared(tmp_path / "out", str(path), "prompts", on_bad_row="skip")) == 2
    assert DataCard.load(tmp_path / "out").bad == {"double_key": 1}


def test_message_about_a_row_of_any_size_stays_short(tmp_path):
    wide = {f"column {number}": "x" for number in range(5000)} | {"y" * 100_000: 1}
    role = {"messages": [{"role": "r" * 100_000, "content": "x"}]}
    for row, text in ((wide, "4,989 more"), (role, "expected one of system, user, assistant")):
        with pytest.raises(DataError) as error:
            prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]))
        assert text in str(error.value)
        assert len(str(error.value)) < 1500


def test_parquet_value_that_python_cannot_hold_is_one_bad_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    when = pa.array([0, 2**62, 0]).cast(pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "when": when}), tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 2: column 'when' of type timestamp\[ms\] holds"):
        prepared(tmp_path / "out", source, "prompts")
    assert len(prepared(tmp_path / "out", source, "prompts", on_bad_row="skip")) == 2
    assert DataCard.load(tmp_path / "out").bad == {"unreadable_value": 1}


def test_parquet_with_an_unknown_time_zone_or_a_column_twice(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    when = pa.array([0]).cast(pa.timestamp("ms", "Mars/Base"))
    pq.write_table(pa.table({"prompt": ["a"], "when": when}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="Mars/Base"):
        prepared(tmp_path / "out", str(tmp_path / "a.parquet"), "prompts")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="repeats a column: prompt, prompt"):
        prepared(tmp_path / "out", str(tmp_path / "b.parquet"), "prompts")
