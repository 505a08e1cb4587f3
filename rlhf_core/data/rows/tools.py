"""Reads tools, calls of tools and their results, in the forms that projects write.

    tools           [{"type": "function", "function": {"name", "description", "parameters"}}, ...],
                    as JSON text too; or the functions alone, as OpenAI's `functions` and ShareGPT
    tool_calls      [{"id", "type": "function", "function": {"name", "arguments"}}, ...] of a reply;
                    the arguments are an object, or JSON text. `function_call` holds a single one
    function_call   (also tool_call), a turn of its own in ShareGPT: {"name", "arguments"} as text
    tool            (also function, observation ...), a turn with the result of a call

They are read into OpenAI's form, with objects as arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf_core.data.rows.columns import Rules, check_unread, is_empty
from rlhf_core.data.rows.row import (
    CALLS,
    TOOLS,
    BadRow,
    Message,
    names,
    parse_json,
    short,
    whole_text,
)

RESULT_ROLES = frozenset(
    {"tool", "function", "observation", "ipython", "tool_response", "tool_result", "tool_results",
     "function_response", "function_result"}
)  # fmt: skip
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})
CALL_KEYS = (CALLS, "function_call")
_MAY_BE_NULL = ("default", "const", "example")


def read_tools(value: Any, name: str) -> list[dict[str, Any]]:
    """The tools of a column, each as {"type": "function", "function": {...}}.

    Raises:
        BadRow: it holds something else.
    """
    found = _json(value, name)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise _not_tools(name, found)
    tools = []
    for number, item in enumerate(found, 1):
        where = f"tool {number} of {name}"
        tool = _without_null(_json(item, where))
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or tool.get("type", "function") != "function":
            raise _not_tools(where, tool)
        function = {key: item for key, item in inner.items() if key != "type"}
        if not isinstance(function.get("name"), str) or not function["name"].strip():
            raise _not_tools(where, tool)
        if "input_schema" in function and "parameters" not in function:
            function["parameters"] = function.pop("input_schema")  # Anthropic's name
        parameters = _json(function.get("parameters") or {}, f"the parameters of {where}")
        if not isinstance(parameters, dict):
            raise _not_tools(f"the parameters of {where}", parameters)
        if "parameters" in function:
            function["parameters"] = parameters
        tools.append({"type": "function", "function": function})
    return _writable(tools, name)


def with_tools(
    messages: Sequence[Message], tools: list[dict[str, Any]], rules: Rules
) -> list[Message]:
    """The conversation with its tools, which the first message holds.

    Raises:
        BadRow: it has other tools already.
    """
    first = messages[0]
    if first.get(TOOLS, tools) != tools:
        raise BadRow(
            "unused_column",
            "the first message and the column with tools hold different tools; keep one of the two",
        )
    text = _squeezed(first["content"]) if first["role"] == "system" else ""
    if all(_squeezed(said) in text for tool in tools for said in _said(tool["function"])):
        rules.remarks.add("tools not added: the system message lists them already")
        return list(messages)
    return [first | {TOOLS: tools}, *messages[1:]]


def without_padding(message: Message, tools: Sequence[dict[str, Any]]) -> Message:
    """The reply without null arguments that the tools of its calls do not have: tables fill up the
    objects of a column so that all have the same keys."""
    own = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}

    def kept(function: dict[str, Any]) -> dict[str, Any]:
        known = own.get(function["name"], {}).get("properties")
        if not isinstance(known, dict):
            return function
        given = function["arguments"].items()
        return function | {"arguments": {k: v for k, v in given if v is not None or k in known}}

    calls = [call | {"function": kept(call["function"])} for call in message[CALLS]]
    copy = type(message)(message)
    copy[CALLS] = calls
    return copy


def read_calls(value: Any, where: str, rules: Rules) -> list[dict[str, Any]]:
    """The calls of a reply.

    Raises:
        BadRow: the value is none, or the arguments of a call are no JSON object.
    """
    found = _json(value, where)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        raise _not_calls(where, found)
    calls = []
    for number, item in enumerate(found, 1):
        which = f"call {number} of {where}"
        call = _json(item, which)
        if not isinstance(call, dict) or call.get("type") not in (None, "", "function"):
            raise _not_calls(which, call)
        function = call if is_empty(call.get("function")) else call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _not_calls(which, call)
        key = "arguments" if "arguments" in function else "parameters"
        given = function.get(key)
        arguments = {} if is_empty(given) else _json(given, f"the arguments of {which}")
        if not isinstance(arguments, dict):
            raise BadRow(
                "wrong_type",
                f"the arguments of {which} are {short(given)}; expected an object, or its JSON",
            )
        read = {"type", "function", "id", "name", key}
        check_unread(call, sorted(call.keys() - read), rules, which)
        known = {} if is_empty(call.get("id")) else {"id": str(call["id"])}
        calls.append(
            known | {"type": "function",
                     "function": {"name": function["name"], "arguments": arguments}}
        )  # fmt: skip
    return _writable(calls, where)


def listed_calls(value: Any) -> list[str]:
    """The names of the tools that a list of calls, as JSON too, calls; empty if it is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except BadRow:
            return []
    calls = value if isinstance(value, list) else []
    if not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls):
        return []
    return [str(call["name"]) for call in calls]


def check_calls_in_text(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Check that no reply's text is a list of calls as JSON: the chat template tells the model to
    write calls in another form.

    Args:
        tools: that the model may call.

    Raises:
        BadRow: one is.
    """
    known = {tool["function"]["name"] for tool in tools}
    for turn, message in enumerate(messages, 1):
        called = listed_calls(message["content"]) if message["role"] == "assistant" else []
        if called and known.issuperset(called):
            raise BadRow(
                "unused_column",
                f"message {turn}, a reply, is a text with calls of {short(called)} as JSON, but "
                "chat templates write calls in a form of their own: write it as tool_calls of the "
                "message, or, if a column is the reply, set columns: {tool_calls: <its name>}. If "
                "the text is right as it is, the system message must say so: put the tools there, "
                "and set ignore_columns: [tools]",
            )


def read_result(value: Any, where: str) -> str:
    """The text of a tool's result: texts and text parts as they are, other values as JSON.

    Raises:
        BadRow: the value cannot be written.
    """
    if isinstance(value, str) or value is None:
        return whole_text(value or "", where)
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
           for p in parts):  # fmt: skip
        return whole_text("".join(part["text"] for part in parts), where)
    return _dump(value, where)


def match_results(messages: Sequence[Message], rules: Rules) -> list[Message]:
    """The conversation with the results of each turn's calls in the order of the calls, and with
    the name of its tool in each.

    Results without ids answer the calls in their order.

    Raises:
        BadRow: a result follows no reply, or no call is its own.
    """
    matched: list[Message] = []
    at = 0
    while at < len(messages):
        matched.append(messages[at])
        end = at + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        if end > at + 1:
            matched += _match(messages[at], messages[at + 1 : end], at + 1, rules)
        at = end
    return matched


# --------------------------------------------------------------------------- details


def _match(reply: Message, results: Sequence[Message], turn: int, rules: Rules) -> list[Message]:
    """The results of one reply. turn: the reply's number."""
    if reply["role"] != "assistant":
        raise BadRow(
            "role_order",
            f"message {turn + 1} is the result of a tool after a turn of the role {reply['role']}; "
            "expected the reply with the call before it",
        )
    calls = reply.get(CALLS)
    if calls is None:  # the call stands in the reply's text
        return list(results)
    ids = [call.get("id") for call in calls]
    places = []
    for number, result in enumerate(results):
        wanted = result.get("tool_call_id")
        if wanted is None or not any(ids):
            places.append(number)
        elif wanted in ids:
            places.append(ids.index(wanted))
        else:
            raise BadRow(
                "tool_result",
                f"message {turn + 1 + number} is the result of the call {short(wanted)}; the reply "
                f"before it made the calls {short(ids)}",
            )
    if len({*places}) < len(places) or max(places) >= len(calls):
        raise BadRow(
            "tool_result",
            f"message {turn} makes {len(calls)} calls, and {len(results)} results follow; expected "
            "one for each call",
        )
    if places != sorted(places):
        rules.remarks.add("results of tools put into the order of their calls")
    ordered = sorted(zip(places, results, strict=True), key=lambda pair: pair[0])
    return [{"name": calls[place]["function"]["name"]} | result for place, result in ordered]


def _json(value: Any, where: str) -> Any:
    """A value, read from its JSON text if it is a text.

    Raises:
        BadRow: it is a text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except BadRow as bad:
        raise BadRow("wrong_type", f"{where} is a text that is not JSON ({bad.message})") from None


T = TypeVar("T")


def _writable(value: T, where: str) -> T:
    """The value, if it can be written as JSON."""
    _dump(value, where)
    return value


def _dump(value: Any, where: str) -> str:
    try:
        return whole_text(json.dumps(value, ensure_ascii=False, allow_nan=False), where)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("wrong_type", f"{where} cannot be written as JSON ({error})") from None


def _without_null(value: Any) -> Any:
    """A JSON schema without the nulls by which tables fill up columns of objects."""
    if isinstance(value, dict):
        return {
            key: _without_null(item)
            for key, item in value.items()
            if item is not None or key in _MAY_BE_NULL
        }
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _said(function: Mapping[str, Any]) -> list[str]:
    """What a text that lists a function says at least."""
    return [function["name"], str(function.get("description") or "")]


def _squeezed(text: str) -> str:
    return re.sub(r"\W+", "", text)


def _not_tools(where: str, value: Any) -> BadRow:
    found = names(value) if isinstance(value, dict) else short(value)
    return BadRow(
        "wrong_type",
        f"{where} is {found}; expected tools as JSON schemas: name, description and parameters, "
        'alone or as {"type": "function", "function": ...}',
    )


def _not_calls(where: str, value: Any) -> BadRow:
    found = names(value) if isinstance(value, dict) else short(value)
    return BadRow(
        "wrong_type", f"{where} is {found}; expected calls of tools: name and arguments of each"
    )
