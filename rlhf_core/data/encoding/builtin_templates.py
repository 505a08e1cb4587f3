"""The built-in chat templates: Jinja source with two placeholders that `fill` replaces.

BOS is the text that the tokenizer puts before every sequence. END is the end-of-turn token: the
template's own if it is one token of the vocabulary, else the tokenizer's eos token.
"""

from __future__ import annotations

import json

BOS, END = "@BOS@", "@END@"

TURN_TOKENS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}

_CHATML = """\
{{ @BOS@ }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + @END@ + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_LLAMA3 = """\
{{ @BOS@ }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] + @END@ }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_ALPACA = """\
{{ @BOS@ }}
{%- if messages[0]['role'] != 'system' %}
{{- 'Below is an instruction that describes a task. Write a response that appropriately ' }}
{{- 'completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else %}
{{- '### Response:\\n' + message['content'] + @END@ + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}"""

_VICUNA = """\
{{ @BOS@ }}
{%- if messages[0]['role'] != 'system' %}
{{- 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions.\\n" }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}
{{- 'USER: ' + message['content'] + '\\n' }}
{%- else %}
{{- 'ASSISTANT:\\n' + message['content'] + @END@ + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'ASSISTANT:\\n' }}
{%- endif %}"""

_PLAIN = """\
{{ @BOS@ }}
{%- for message in messages %}
{{- message['content'] }}
{%- if message['role'] == 'assistant' %}
{{- @END@ }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}"""

SOURCES = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "alpaca": _ALPACA,
    "vicuna": _VICUNA,
    "plain": _PLAIN,
}


def fill(name: str, bos: str, end: str) -> str:
    """A template's source with the bos and end-of-turn texts of one tokenizer."""
    return SOURCES[name].replace(BOS, json.dumps(bos)).replace(END, json.dumps(end))
