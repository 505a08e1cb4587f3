#!/usr/bin/env bash
# Chat templates of reasoning models, as TRL 1.16.0 ships them: the key of a message that holds its reasoning has three
# names, no name is read by all 17 templates, and what stands under another name is left out without a word.
#
# One would have guessed: one key for reasoning, as there is one for calls (tool_calls), or an error for a key that a template
# does not know. Qwen 3, GLM 4 and Nemotron 3 read reasoning_content, gpt-oss and the first LFM 2.5 read thinking, Gemma 4
# reads reasoning too. A server's answer has one of these names (vLLM 0.32: reasoning), whatever model will read it next.
#
# Whom it hurts: who distils a reasoning model, or trains on its recorded answers: under the wrong name the model is trained
# to answer at once, with an empty <think></think> where its template writes one, and the loss looks fine. What helps: give
# a template the text under all three names, and look for it in what comes out.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.19.0 jinja2==3.1.6 numpy==2.4.6
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps trl==1.16.0
cat > "$folder/probe.py" <<'PY'
import importlib.util, pathlib
from importlib.metadata import version
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

logging.set_verbosity_error()
KEYS = ("reasoning_content", "reasoning", "thinking")
folder = pathlib.Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
print("trl", version("trl"), "transformers", version("transformers"))

def written(template, key):
    chat = [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Answer.", key: "Because."}]
    try:
        return "Because." in render_jinja_template([chat], chat_template=template, bos_token="", eos_token="")[0][0]
    except Exception:
        return False  # this one wants other messages

read = {}
for file in sorted(folder.glob("*.jinja")):
    if file.stem.endswith("_training"):  # TRL's own changes
        continue
    found = tuple(key for key in KEYS if written(file.read_text(), key))
    if found:
        read.setdefault(found, []).append(file.stem)
for found, names in read.items():
    print(f"{' or '.join(found)}: {', '.join(names)}")
count = sum(map(len, read.values()))
by_key = {key: sum(len(names) for found, names in read.items() if key in found) for key in KEYS}
print(f"of {count} templates:", ", ".join(f"{n} read {key}" for key, n in by_key.items()))
assert count == 17 and all(0 < n < count for n in by_key.values())
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1 "$folder/venv/bin/python" "$folder/probe.py"
