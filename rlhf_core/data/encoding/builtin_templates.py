"""The built-in chat templates: Jinja source with two placeholders that `fill` replaces.

BOS is the text that the tokenizer puts before every sequence. END is the end-of-turn token: the
template's own if it is one token of the vocabulary, else the tokenizer's eos token.
"""

from __future__ import annotations

import json

BOS, END = "@BOS@", "@END@"

TURN_TOKENS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "hermes": "<|im_end|>"}

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

# ChatML with tools and reasoning: the form of Hermes' function calling, which Qwen writes too.
_HERMES = """\
{{ @BOS@ }}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- endif %}
{{- 'You can call functions. Their signatures stand within <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' }}{{- tool | tojson }}
{%- endfor %}
{{- '\\n</tools>\\nFor each call, write a JSON object within <tool_call></tool_call>:\\n' }}
{{- '<tool_call>\\n{"name": <function name>, "arguments": <object>}\\n</tool_call>' }}
{{- @END@ + '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>tool' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
{{- @END@ + '\\n' }}
{%- endif %}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}
{{- '\\n' }}
{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- @END@ + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

SOURCES = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "alpaca": _ALPACA,
    "vicuna": _VICUNA,
    "plain": _PLAIN,
    "hermes": _HERMES,
}


def fill(name: str, bos: str, end: str) -> str:
    """A template's source with the bos and end-of-turn texts of one tokenizer."""
    return SOURCES[name].replace(BOS, json.dumps(bos)).replace(END, json.dumps(end))
