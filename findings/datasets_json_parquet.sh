#!/usr/bin/env bash
# datasets 5.2.0: conversations with tools that went through load_dataset("json") and to_parquet are texts inside the
# Parquet file, for readers other than `datasets`.
#
# One would have guessed: a column of Parquet holds what the column of JSON Lines held, lists and objects, as it did when
# all rows have the same keys. But where keys differ, which is so as soon as two tools have other parameters or one message
# has a call and another none, the reader of JSON chooses the type Json at that depth, and the file has a JSON text there:
# each message is one text; of a tool's schema everything is an object but `properties`, which is a text. Nothing fails: a
# chat template then writes "properties": "{\"city\": ..." into the prompt, a schema that the model has never seen.
#
# Whom it hurts: who prepares data with tools in `datasets` and reads its Parquet by pandas or pyarrow, as training code
# does. The way out is to parse the values of the Arrow type arrow.json, at whatever depth the file's schema has it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import json
import datasets, pandas, pyarrow
import pyarrow.parquet as pq

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__, "pandas", pandas.__version__)

def row(name, *keys):
    kinds = {"type": "object", "properties": {key: {"type": "string"} for key in keys}}
    call = {"function": {"name": name, "arguments": {key: "x" for key in keys}}}
    return {"messages": [{"role": "user", "content": "Please."}, {"role": "assistant", "tool_calls": [call]}],
            "tools": [{"function": {"name": name, "parameters": kinds}}]}

def written(name, rows):
    with open(f"{name}.jsonl", "w") as lines:
        lines.writelines(json.dumps(one) + "\n" for one in rows)
    made = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")
    assert made[0] == rows[0]
    made.to_parquet(f"{name}.parquet")
    return f"{name}.parquet"

alike = written("alike", [{"messages": [{"role": "user", "content": "Hello."}]}] * 2)
mixed = written("mixed", [row("weather", "city"), row("mail", "address", "subject")])
plain = pq.read_table(alike).to_pylist()[0]["messages"][0]
table = pq.read_table(mixed)
message = table.to_pylist()[0]["messages"][0]
tool = table.to_pylist()[0]["tools"][0]
print("a message where all have the same keys:", plain)
print("a message beside one with a call:      ", repr(message))
print("a tool beside another one:", json.dumps(tool))
by_pandas = pandas.read_parquet(mixed)["messages"][0][0]
by_datasets = datasets.load_dataset("parquet", data_files=mixed, split="train", cache_dir="cache")[0]["messages"][0]
print(f"pandas reads a {type(by_pandas).__name__}, datasets a {type(by_datasets).__name__}")
assert isinstance(plain, dict) and isinstance(message, str) and isinstance(by_pandas, str)
assert isinstance(tool["function"]["parameters"], dict) and isinstance(by_datasets, dict)
assert isinstance(tool["function"]["parameters"]["properties"], str)
PY
cd "$folder" && HF_HUB_OFFLINE=1 HF_HOME="$folder/home" venv/bin/python probe.py
