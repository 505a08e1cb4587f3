#!/usr/bin/env bash
# Chat templates as TRL 1.16.0 ships them, and calls of tools: four leave out the text beside a call, and the arguments as
# OpenAI's API has them, which are JSON text, are written by eight as a text within JSON, or in braces too many.
#
# One would have guessed: what a template does not take, it refuses, as several do; a reply with a call keeps its text; and a
# call that an OpenAI-compatible server returned can be given back as it is. Instead Llama 3.1 and 3.2, gpt-oss and Muse
# Glimmer drop "Let me look that up." for good, and with arguments as text Llama 3, Qwen 2.5 and gpt-oss write
# "{\"city\": \"Rome\"}" where they write {"city": "Rome"} for an object, and Gemma 4 wrote {{"city": "Rome"}}. DeepSeek V3 is
# the other way round: it wants the text, and raises for an object, the form that transformers documents.
#
# Whom it hurts: who trains on recorded conversations with tools: the model learns calls that no parser reads, or calls
# without the words before them. What helps: render one call of each kind, and look for its parts in what comes out.
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
folder = pathlib.Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
print("trl", version("trl"), "transformers", version("transformers"))
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "A city."}}, "required": ["city"]}}}

def rendered(template, arguments, text=""):
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    chat = [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "Sun."},
            {"role": "assistant", "content": "Answer."}]
    try:
        return render_jinja_template([chat], tools=[TOOL], chat_template=template, bos_token="", eos_token="")[0][0]
    except Exception as error:
        return error

lost, as_text, as_object = [], {}, []
for file in sorted(folder.glob("*.jinja")):
    if file.stem.endswith("_training"):  # TRL's own changes
        continue
    template = file.read_text()
    from_object, from_text = rendered(template, {"city": "Rome"}), rendered(template, '{"city": "Rome"}')
    calls = [found for found in (from_object, from_text) if isinstance(found, str) and "Rome" in found]
    if not calls:
        continue  # it writes no calls
    if isinstance(from_object, Exception):
        as_object.append(file.stem)
        continue
    beside = rendered(template, {"city": "Rome"}, "Let me look.")
    if "Let me look." not in str(beside):
        lost.append(file.stem)
    kind = ("raise an error" if isinstance(from_text, Exception) else "write the same" if from_text == from_object
            else "write a text in JSON" if '\\"city' in from_text else "write braces too many")
    as_text.setdefault(kind, []).append(file.stem)
print("text beside a call left out:", ", ".join(lost))
print("an object as arguments raises:", ", ".join(as_object))
for kind, names in as_text.items():
    print(f"with JSON text as arguments {len(names)} {kind}: {', '.join(names)}")
assert lost == ["gptoss", "llama3_1", "llama3_2", "muse_glimmer"] and as_object == ["deepseekv3"]
assert as_text["write a text in JSON"] == ["gptoss", "llama3_1", "llama3_2", "qwen2_5"]
assert len(as_text["write braces too many"]) == 4
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1 "$folder/venv/bin/python" "$folder/probe.py"
