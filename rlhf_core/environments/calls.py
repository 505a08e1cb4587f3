"""Tool calls in the text of a reply.

Four forms are read, which cover most models:

    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>         Hermes, Qwen 2.5 and 3
    <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
                                                         Qwen 3 Coder, 3.5 and 3.6, Nemotron 3
    <|tool_call_start|>[f(a=1)]<|tool_call_end|>                        LFM 2 and 2.5
    {"name": "f", "parameters": {"a": 1}}                               Llama 3.1, 3.2

The last one is a whole reply, after <|python_tag|> or not. Calls in a reply's reasoning are none.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_LISTED = re.compile(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_TAG, _REASONED = "<|python_tag|>", "</think>"
EXAMPLE = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
_WORDS = {"true": True, "false": False, "null": None, "none": None}


class Call(NamedTuple):
    """One call that a reply makes."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""
    """Why it cannot be read; empty if it can."""
    texts: bool = False
    """The arguments are texts, of whatever type they are meant to be; see `typed`."""


def find_calls(reply: str) -> list[Call]:
    """The calls of a reply in their order; none in a reply that is an answer.

    What stands within the tags and cannot be read is a call with a problem.
    """
    reply = reply.rpartition(_REASONED)[2]
    if "<tool_call>" in reply:
        return [_read(match[1]) for match in _TAGGED.finditer(reply)]
    if "<|tool_call_start|>" in reply:
        return [call for match in _LISTED.finditer(reply) for call in _read_python(match[1])]
    text = reply.strip().removeprefix(_TAG).strip()
    if not text.startswith("{"):
        return []
    call = _read(text)
    # Without tags an object may be an answer: it is a call only if it says whose.
    return [call] if _TAG in reply or not call.problem else []


def typed(arguments: Mapping[str, str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are written as texts, as values of the types that a tool asks for. What is no
    such value stays a text, for the tool to refuse.

    Args:
        parameters: JSON schema of the tool.
    """
    known = parameters.get("properties")
    properties: Mapping[str, Any] = known if isinstance(known, Mapping) else {}
    return {name: _typed(text, properties.get(name)) for name, text in arguments.items()}


# --------------------------------------------------------------------------- details


def _read(text: str) -> Call:
    if text.lstrip().startswith("<function="):
        return _read_xml(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"the call is not JSON ({error}); expected {EXAMPLE}")
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return Call("", {}, f"the call names no tool; expected {EXAMPLE}")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # JSON within JSON, as OpenAI's clients write it
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return Call(name, {}, f"the arguments are not an object; expected {EXAMPLE}")
    return Call(name, arguments)


def _read_xml(text: str) -> Call:
    name, closed, inside = text.strip().removeprefix("<function=").partition(">")
    if not closed or "\n" in name:
        return Call("", {}, "the tag <function=...> of the call is not closed")
    inside = inside.removesuffix("</function>")
    arguments = {
        match[1].strip(): match[2].removeprefix("\n").removesuffix("\n")
        for match in _PARAMETER.finditer(inside)
    }
    if _PARAMETER.sub("", inside).strip():
        return Call(name, {}, "a <parameter=...> of the call is not closed by </parameter>")
    return Call(name.strip(), arguments, texts=True)


def _read_python(text: str) -> list[Call]:
    problem = f"the call {text.strip()[:60]!r} is not of the form [name(key=value)]"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        found = []
        for call in calls:
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                raise ValueError
            if any(keyword.arg is None for keyword in call.keywords):
                raise ValueError
            given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            found.append(Call(call.func.id, given))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return [Call("", {}, problem)]
    return found


def _typed(text: str, schema: Any) -> Any:
    if schema is None or "string" in _types(schema):
        return text
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _types(schema: Any) -> set[str]:
    """The types that a schema allows, as far as it names them."""
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("type", ())
    found = {own} if isinstance(own, str) else {str(one) for one in own}
    return found.union(*(_types(one) for one in schema.get("anyOf", ())))
