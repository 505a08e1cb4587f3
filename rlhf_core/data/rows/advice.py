"""What to do with rows that no format reads: the setting `columns` that fits, or what to write.

The names of columns are those of public data sets; they are only used for advice.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rlhf_core.data.rows.columns import is_empty, read_flag
from rlhf_core.data.rows.layout import CONVERSATION
from rlhf_core.data.rows.markers import turns_in
from rlhf_core.data.rows.meanings import meaning
from rlhf_core.data.rows.row import short
from rlhf_core.data.rows.tools import listed_calls
from rlhf_core.jobs import Format, Purpose

_PROMPTS = (
    "prompt", "question", "query", "problem", "instruction", "input", "inputs", "user", "human",
    "context_messages", "task", "post", "text", "article", "document", "dialogue", "context",
)  # fmt: skip
REPLIES = (
    "completion", "response", "output", "outputs", "solution", "generated_solution", "answer",
    "reply", "assistant", "gpt", "bot", "target", "targets", "summary", "generation", "final",
    "content",
)  # fmt: skip
_CONTEXTS = ("input", "context", "passage", "article", "document", "schema", "background")
_SYSTEMS = ("system", "system_prompt", "system_message", "sys", "meta_instruction")
_PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_j", "response_k"),
    ("response_chosen", "response_rejected"), ("better", "worse"), ("win", "lose"),
    ("accepted", "rejected"), ("preferred", "dispreferred"), ("positive", "negative"),
    ("preferred_output", "non_preferred_output"), ("pos_resp", "neg_resp"),
    ("chosen_conversations", "rejected_conversations"),
)  # fmt: skip
# Two replies of which another column says which is better: response_a, response_b and the like.
_SIDES = re.compile(
    r"(.*(?:respon|answer|output|completion|conversation|human_ref|reply|summary).*)[aAbB012]"
)


def advice(row: dict[str, Any], purpose: Purpose | None) -> str:
    """What a setting or another way of writing the row may do; "" if nothing is known."""
    if columns := _settings(row, purpose):
        return f"For these, set columns: {json.dumps(columns, ensure_ascii=False)}. "
    if purpose != "prompts" and (names := _sides(row)):
        return (
            f"Columns {names[0]!r} and {names[1]!r} may be two replies: write the better one as "
            "chosen and the other as rejected. "
        )
    for name, value in row.items():
        if found := _nested(name, value, purpose):
            return found
    return ""


def whole_table(row: dict[str, Any]) -> str:
    """What to do with a row that is a whole table, written in another way; "" if it is none."""
    values = list(row.values())
    if len(row) == 1 and (mark := next((m for m in ";\t|" if m in next(iter(row))), "")):
        return f"The file separates its columns by {mark!r}; write it with commas"
    if len(row) > 1 and all(isinstance(v, dict) and v.keys() == {*map(str, range(len(v)))}
                            for v in values):  # fmt: skip
        return (
            "The file holds a table by columns, as pandas writes it; write one object for each row "
            "(orient='records', lines=True)"
        )
    return ""


def instead(format: Format, purpose: Purpose) -> str:
    """What to do with rows of a format that a purpose cannot use; "" if nothing is known."""
    pairs = format in ("hh", "preference", "implicit_prompt")
    if purpose == "preference":
        return (
            "A row needs two replies to one prompt; data.preference: {source: sampled} makes pairs "
            "from prompts. "
        )
    if purpose == "unpaired" and pairs:
        return "KTO takes pairs too: give them as data.preference, and leave data.unpaired empty. "
    if purpose == "unpaired":
        return "Each row needs a label: was the reply good? "
    return "The row has no reply that is known by its name. " if format == "prompt" else ""


def _settings(row: dict[str, Any], purpose: Purpose | None) -> dict[str, str]:
    """The setting `columns` that fits; empty if none does, or none is needed."""
    texts = {n.lower(): n for n, v in row.items() if isinstance(v, str) and v.strip()}
    talks = {n.lower(): n for n, v in row.items() if _is_talk(v)}
    own = texts | talks

    def first(names: tuple[str, ...], *but: str) -> str:
        return next((own[n] for n in names if n in own and own[n] not in but), "")

    prompt, system = first(_PROMPTS), first(_SYSTEMS)
    reply, context = first(REPLIES, prompt), first(_CONTEXTS, prompt)
    calls = next((n for n, v in row.items() if listed_calls(v)), "")
    told = own | {n.lower(): n for n, v in row.items() if _is_talk([v])}
    pair = next((pair for pair in _PAIRS if told.keys() >= {*pair}), ())
    before = next((n for n in talks.values() if not pair or n.lower() not in pair), "")
    sides = _sides(row)
    talk = next((n for n in talks.values() if _ends_with_reply(row[n]) and n not in sides), "")
    if any(isinstance(row.get(name), dict) for name in ("prompt", "input")):
        return {}
    wanted = {"prompt": prompt} if prompt else {}
    if prompt in texts.values() and context in texts.values():
        wanted = {"instruction": prompt, "input": context}
    elif prompt.lower() == "instruction":
        wanted = {"instruction": prompt}
    asked = purpose == "prompts"
    if pair and purpose != "unpaired" and not (asked and prompt) and (
        prompt or before or told[pair[0]] in talks.values()
    ):  # fmt: skip
        wanted |= {"chosen": told[pair[0]], "rejected": told[pair[1]]}
        if before and not prompt and before not in CONVERSATION:
            wanted["messages"] = before
    elif asked and not prompt:
        wanted = {"messages": next(iter(talks.values()))} if talks else {}
    elif asked:
        wanted |= {"answer": own["answer"]} if "answer" in own else {}  # for rewards
    elif purpose == "preference":
        return {}
    elif prompt and calls:
        wanted["tool_calls"] = calls
    elif prompt and reply:
        wanted["output" if "instruction" in wanted else "completion"] = reply
    else:
        wanted = {"messages": talk} if talk else {}
    if purpose == "unpaired":
        label = next((n for n, value in row.items() if _is_verdict(n, value)), "")
        wanted = wanted | {"label": label} if label and (reply or talk) and not sides else {}
    if wanted and system:
        wanted["system"] = system
    renamed = {n: present for n, present in wanted.items() if n != present or n == "answer"}
    return renamed if renamed.keys() - {"answer"} else {}


def _sides(row: dict[str, Any]) -> list[str]:
    """Two columns that differ in their last letter, as response_a and response_b; else none."""
    found: dict[str, list[str]] = {}
    for name in row:
        if match := _SIDES.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    return next((names[:2] for names in found.values() if len(names) > 1), [])


def _nested(name: str, value: Any, purpose: Purpose | None) -> str:
    """What to do about a list or an object that holds replies, turns or a whole row."""
    if isinstance(value, str) and (found := turns_in(value)):
        return (
            f"Column {name!r} holds {short(found)} and may be a conversation in one text: write it "
            "as messages ({role, content}), calls of tools as tool_calls of a reply, and their "
            "results as messages of the role tool. "
        )
    if isinstance(value, dict):
        if _settings(value, purpose) or _sides(value) or any(map(_is_talk, value.values())):
            return f"Column {name!r} holds an object; write what it holds as columns of the row. "
        return ""
    if not isinstance(value, list) or not value or _is_talk(value):
        return ""
    keys = {*map(str.lower, value[0])} if isinstance(value[0], dict) else set()
    if keys & {*_PROMPTS, "messages", "conversations"}:
        return (
            f"Column {name!r} holds a list of objects: if they are the rows, write the list alone "
            "as the file, or one object on each line of a .jsonl file. "
        )
    texts = all(isinstance(item, str) for item in value)
    if texts and re.search("dialog|conversation|chat|turns|data", name, re.I):
        return (
            f"Column {name!r} holds a list of texts: if they are turns, write them as messages "
            "({role, content}) with the roles user and assistant in turn. "
        )
    if (texts or isinstance(value[0], dict)) and purpose != "prompts" and re.search(
        "completion|answer|response|output|generation|summar|repl|solution", name, re.I
    ):  # fmt: skip
        return (
            f"Column {name!r} may hold several replies: write a row for each good one (prompt, "
            "completion), or two of them as chosen and rejected. "
        )
    return ""


def _is_talk(value: Any) -> bool:
    """Whether a value is a list of messages, by its first one."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and (
        {"role", "content"} <= first.keys() or {"from", "value"} <= first.keys()
    )


def _ends_with_reply(value: Any) -> bool:
    last = value[-1] if isinstance(value[-1], dict) else {}
    return last.get("role", last.get("from")) in ("assistant", "gpt")


def _is_verdict(name: str, value: Any) -> bool:
    """Whether a column may be the label of a reply."""
    kind = meaning(name)[0]
    return kind in ("label", "sound") and not is_empty(value) and read_flag(value) is not None
