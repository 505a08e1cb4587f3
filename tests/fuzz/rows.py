"""Rows of every format, sound and spoilt, and files that hold them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.values import anything, deep, texts

words = st.text("abcdefg äß你", min_size=1, max_size=12)
text = st.one_of(words, words, words, texts)


def talk(role: str, content: str, roles: list[str]) -> st.SearchStrategy[Any]:
    turn = st.fixed_dictionaries({role: st.sampled_from(roles), content: text})
    even = st.lists(st.tuples(text, text), min_size=1, max_size=2).map(
        lambda pairs: [
            {role: roles[number % 2], content: said}
            for pair in pairs
            for number, said in enumerate(pair)
        ]
    )
    return st.one_of(even, even, st.lists(turn, max_size=3))


messages = talk("role", "content", ["user", "assistant", "system"])
arguments = st.dictionaries(words, st.one_of(text, st.integers(), st.none(), st.booleans()))
calls = st.lists(
    st.fixed_dictionaries(
        {"name": words, "arguments": st.one_of(arguments, arguments.map(json.dumps))}
    ).map(lambda function: {"type": "function", "function": function}),
    min_size=1,
    max_size=2,
)
tools = st.lists(
    st.fixed_dictionaries(
        {"name": words},
        optional={"description": text, "parameters": st.just({"type": "object", "properties": {}})},
    ),
    min_size=1,
    max_size=2,
)
# A question, a reply with calls, their results, and the answer; ids and reasoning sometimes.
tool_talk = st.tuples(text, calls, text, text, st.booleans(), st.booleans()).map(
    lambda t: [
        {"role": "user", "content": t[0]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [c | ({"id": str(n)} if t[4] else {}) for n, c in enumerate(t[1])],
        }
        | ({"reasoning_content": t[2]} if t[5] else {}),
        *(
            {"role": "tool", "content": t[2]} | ({"tool_call_id": str(n)} if t[4] else {})
            for n in range(len(t[1]))
        ),
        {"role": "assistant", "content": t[3]},
    ]
)
tool_columns = {"tools": st.one_of(tools, tools.map(json.dumps))}
transcript = st.lists(st.tuples(text, text), min_size=1, max_size=2).map(
    lambda pairs: "".join(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in pairs)
)
SOUND: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "alpaca": st.fixed_dictionaries(
        {"instruction": text, "output": text},
        optional={"input": text, "system": text, "history": st.lists(st.lists(text, max_size=3))},
    ),
    "messages": st.fixed_dictionaries(
        {"messages": st.one_of(messages, messages, tool_talk)}, optional=tool_columns
    ),
    "sharegpt": st.fixed_dictionaries(
        {"conversations": talk("from", "value", ["human", "gpt", "system"])},
        optional={"system": text},
    ),
    "prompt_completion": st.fixed_dictionaries(
        {"prompt": st.one_of(text, messages), "completion": st.one_of(text, messages)}
    ),
    "hh": st.tuples(transcript, text, text).map(
        lambda t: {"chosen": f"{t[0]}{t[1]}", "rejected": f"{t[0]}{t[2]}"}
    ),
    "preference": st.fixed_dictionaries(
        {"chosen": st.one_of(text, messages), "rejected": st.one_of(text, messages)},
        optional={"prompt": st.one_of(text, messages), **tool_columns},
    ),
    "implicit_prompt": st.tuples(text, text, text).map(
        lambda t: {"chosen": f"{t[0]} {t[1]}", "rejected": f"{t[0]} {t[2]}"}
    ),
    "unpaired": st.fixed_dictionaries(
        {
            "prompt": st.one_of(text, messages),
            "completion": st.one_of(text, messages),
            "label": st.sampled_from([True, False, 1, 0, 1.0, "true", "False", "0"]),
        }
    ),
    "prompt": st.fixed_dictionaries(
        {"prompt": st.one_of(text, messages, tool_talk)}, optional=tool_columns
    ),
    "text": st.fixed_dictionaries({"text": text}),
}
FORMATS = sorted(SOUND)


@st.composite
def spoilt(draw: st.DrawFn, sound: dict[str, Any]) -> Any:
    """A row that lacks a column, has another type somewhere, or is no row at all."""
    row: dict[str, Any] = json.loads(json.dumps(sound))
    column = draw(st.sampled_from(sorted(row)))
    kind = draw(st.sampled_from(["drop", "replace", "add", "inside", "deep", "other"]))
    if kind == "drop":
        del row[column]
    elif kind == "replace":
        row[column] = draw(anything)
    elif kind == "add":
        names = st.sampled_from(["images", "label", "messages", "prompt", "system", "weight"])
        row[draw(st.one_of(texts, names))] = draw(anything)
    elif kind == "deep":
        row[column] = draw(deep())
    elif kind == "inside" and isinstance(row[column], list) and row[column]:
        turn = draw(st.sampled_from(row[column]))
        if isinstance(turn, dict):
            turn[draw(st.sampled_from([*turn, "tool_calls", "tools", "weight", "name"]))] = draw(
                anything
            )
    else:
        return draw(anything)
    return row


@st.composite
def rows_of(draw: st.DrawFn, format: str, least: int = 1, most: int = 6) -> list[Any]:
    rows: list[Any] = draw(st.lists(SOUND[format], min_size=least, max_size=most))
    return [draw(spoilt(row)) if draw(st.integers(0, 3)) == 0 else row for row in rows]


# --------------------------------------------------------------------------- files


def as_jsonl(rows: list[Any], draw: st.DrawFn) -> bytes:
    ascii, end = draw(st.booleans()), draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"]))
    lines = [json.dumps(r, ensure_ascii=ascii).encode("utf-8", "surrogatepass") for r in rows]
    start = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]))
    return start + end.join(lines) + draw(st.sampled_from([b"", end]))


def as_json(rows: list[Any], draw: st.DrawFn) -> bytes:
    indent = draw(st.sampled_from([None, 1]))
    text = json.dumps(rows, ensure_ascii=draw(st.booleans()), indent=indent)
    if draw(st.integers(0, 3)) == 0:  # one value after another, no array
        text = "\n".join(json.dumps(row) for row in rows)
        if text.startswith("["):
            text = f"[{text}]" if len(rows) == 1 else json.dumps(rows)
    return text.encode("utf-8", "surrogatepass")


def as_csv(rows: list[Any], draw: st.DrawFn) -> bytes:
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    names = list(dict.fromkeys(name.strip() for name in names if name.strip())) or ["text"]
    out = io.StringIO()
    end = draw(st.sampled_from(["\n", "\r\n"]))
    # Python's writer leaves a lone carriage return unquoted, at which its own reader ends the row.
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    for row in rows:
        row = row if isinstance(row, dict) else {}
        cells = [row.get(name, "") for name in names]
        line = [c if isinstance(c, str) else json.dumps(c) for c in cells]
        writer.writerow(line if any(line) else ["x" for _ in line])  # an empty line is no row
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any], draw: st.DrawFn) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    names = [n.encode("utf-8", "replace").decode() for n in names] or ["text"]
    columns = {}
    for name in dict.fromkeys(names):
        cells = [row.get(name) if isinstance(row, dict) else None for row in rows]
        try:
            columns[name] = pa.array(cells)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            # Texts, among them some that are not UTF-8, as other writers leave them.
            raw = [
                None if c is None else (c if isinstance(c, str) else json.dumps(c)).encode(
                    "utf-8", "surrogatepass"
                )
                for c in cells
            ]  # fmt: skip
            columns[name] = pa.array(raw, pa.binary()).view(pa.string())
    out = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), out)
    except (pa.ArrowException, UnicodeEncodeError):  # an empty struct cannot be written
        out = io.BytesIO()
        pq.write_table(pa.table({"text": ["a"] * len(rows)}), out)
    return out.getvalue()


def as_gzip(rows: list[Any], draw: st.DrawFn) -> bytes:
    return gzip.compress(as_jsonl(rows, draw), mtime=0)


FILES = {
    "a.jsonl": as_jsonl,
    "a.json": as_json,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "a.jsonl.gz": as_gzip,
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes, int, str]:
    """(name, content, rows in it, format of the rows)."""
    format, name = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(sorted(FILES)))
    rows = draw(rows_of(format))
    return name, FILES[name](rows, draw), len(rows), format


@st.composite
def typed_tables(draw: st.DrawFn) -> tuple[bytes, int]:
    """(Parquet file, rows) with columns of types that JSON does not have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    i64 = st.integers(-(2**63), 2**63 - 1)
    kinds: list[tuple[Any, st.SearchStrategy[Any]]] = [
        *(
            (pa.timestamp(unit, tz), i64)
            for unit in ("s", "ms", "us", "ns")
            for tz in (None, "UTC")
        ),
        (pa.timestamp("ms", "Mars/Base"), i64),
        (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
        (pa.time64("ns"), st.integers(0, 86_399_999_999_999)),
        (pa.duration("s"), i64),
        (pa.float64(), st.floats()),
        (pa.list_(pa.list_(pa.int64())), st.lists(st.lists(i64, max_size=2), max_size=2)),
    ]
    rows = draw(st.integers(1, 3))
    columns: dict[str, Any] = {"text": pa.array(["a"] * rows)}
    for number in range(draw(st.integers(1, 3))):
        kind, values = draw(st.sampled_from(kinds))
        cells = draw(st.lists(st.none() | values, min_size=rows, max_size=rows))
        name = draw(st.sampled_from(["text", "prompt", f"c{number}"]))
        if pa.types.is_temporal(kind):
            width = pa.int32() if kind == pa.date32() else pa.int64()
            columns[name] = pa.array(cells, width).cast(kind)
        else:
            columns[name] = pa.array(cells, kind)
    names = list(columns)
    if len(names) > 1 and draw(st.integers(0, 5)) == 0:
        names[-1] = "text"  # two columns of one name
    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_arrays(list(columns.values()), names), out)
    except pa.ArrowException:  # a year that Parquet has no room for
        return draw(typed_tables())
    return out.getvalue(), rows
