"""Parquet with values of the type JSON, as `datasets` writes objects whose keys differ."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_core.data.rows.row import BadRow
from rlhf_core.data.sources.open import open_rows
from rlhf_core.jobs import DataSettings
from tests.rlhf_core.data.helpers import jsonl


def rows_of(file):
    return [raw.data for raw in open_rows(DataSettings(source=str(file)))]


def talk(name, **arguments):
    kinds = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    tool = {"name": name, "description": f"Does {name}.", "parameters": kinds}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"Please {name}."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "Done."},
            {"role": "assistant", "content": "I did."},
        ],
        "tools": [{"type": "function", "function": tool}],
    }


def test_parquet_of_datasets_holds_what_its_json_lines_held(tmp_path):
    import datasets

    rows = [talk("add", first="1", second="2"), talk("search", query="zebras")]
    lines = jsonl(tmp_path / "a.jsonl", rows)
    cache = str(tmp_path / "cache")
    made = datasets.load_dataset("json", data_files=lines, split="train", cache_dir=cache)
    made.to_parquet(tmp_path / "a.parquet")
    types = str(pq.read_schema(tmp_path / "a.parquet"))
    assert "arrow.json" in types  # what this test is about
    assert rows_of(tmp_path / "a.parquet") == rows
    assert [json.loads(line) for line in rows_of(lines)] == rows


def test_json_is_read_inside_lists_and_structs_and_may_be_null(tmp_path):
    text = pa.array(['{"a": 1}', None, "[2]"]).cast(pa.json_())
    inside = pa.StructArray.from_arrays([text, pa.array(["x", "y", "z"])], ["json", "plain"])
    table = pa.table({"json": text, "inside": inside, "plain": ["{}", "[]", "{}"],
                      "lists": pa.ListArray.from_arrays([0, 2, 2, 3], text)})  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        {"json": {"a": 1}, "inside": {"json": {"a": 1}, "plain": "x"}, "plain": "{}",
         "lists": [{"a": 1}, None]},
        {"json": None, "inside": {"json": None, "plain": "y"}, "plain": "[]", "lists": []},
        {"json": [2], "inside": {"json": [2], "plain": "z"}, "plain": "{}", "lists": [[2]]},
    ]  # fmt: skip


def test_malformed_json_is_one_bad_row(tmp_path):
    extra = pa.array(['{"a": 1}', '{"a": ', None]).cast(pa.json_())
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "extra": extra}), tmp_path / "a.parquet")
    first, second, third = rows_of(tmp_path / "a.parquet")
    assert (first["extra"], third["extra"]) == ({"a": 1}, None)
    assert isinstance(second, BadRow) and second.reason == "malformed_json"
