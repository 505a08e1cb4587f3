#!/usr/bin/env bash
# datasets 5.2.0: where a column holds values of several types, its texts that happen to be JSON are no texts any more:
# "007" is read as 7, "1.10" as 1.1, "true" as True, and a reply '{"city": "Rome"}' as a dictionary.
#
# One would have guessed: a text of a JSON file is read as that text, whatever other rows hold. So it is while all rows hold
# texts. One row with a number, or one message whose content is a list of parts, makes the column of the type Json, which
# keeps each value as its JSON; a text that is valid JSON already is taken for encoded, and decoded once more than it was
# encoded. It happens to the reader of JSON (also streaming), to map(), and to from_list() with on_mixed_types="use_json".
# Nothing is logged, and the file's other rows show nothing.
#
# Whom it hurts: who compares replies with answers as texts ("1.10" is 1.1, an answer "null" is gone), and who trains on
# replies in JSON beside messages with parts: the content is no text, and a chat template writes it as Python does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import json
import datasets
from datasets import Dataset, load_dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
texts = ["007", "1.10", "true", "null", '"quoted"', '{"city": "Rome"}', "plain"]

def from_file(name, rows, **options):
    with open(f"{name}.jsonl", "w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache", **options)

def answers(rows):
    return [row["answer"] for row in rows][: len(texts)]

only = [{"answer": text} for text in texts]
mixed = [*only, {"answer": 5}]
alone = answers(from_file("only", only))
beside = answers(from_file("mixed", mixed))
others = [answers(from_file("mixed", mixed, streaming=True)),
          answers(Dataset.from_list(mixed, on_mixed_types="use_json")),
          answers(Dataset.from_list([{"i": i} for i in range(len(mixed))]).map(lambda row: mixed[row["i"]]))]
print("texts alone:          ", alone)
print("beside a row with 5:  ", beside)
print("streaming, from_list and map do the same:", all(found == beside for found in others))
said = lambda content: {"messages": [{"role": "assistant", "content": content}]}
talks = from_file("talks", [*map(said, texts), said([{"type": "text", "text": "Hello."}])])
contents = [talk["messages"][0]["content"] for talk in talks][: len(texts)]
print("beside a list of parts:", contents)
assert alone == texts and all(found == beside == contents for found in others)
assert beside == [7, 1.1, True, None, "quoted", {"city": "Rome"}, "plain"]
PY
cd "$folder" && HF_HUB_OFFLINE=1 HF_HOME="$folder/home" venv/bin/python probe.py
