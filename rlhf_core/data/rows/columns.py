"""Columns and keys that a format does not read: each is harmless, ignored by a setting, or refused.

    harmless   empty values; numbers, dates and texts under a name that carries no part of the
               conversation (id, source, category, score ...); the data card counts them
    refused    names that change what a row means (images, tools, weight, history, reasoning ...),
               and lists and objects under unknown names
    ignored    what the setting `ignore_columns` names

The decision depends on names and kinds of values, never on their size, so that one row of a file is
not refused for what another one passes with.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.dataset.carried import carried
from rlhf_core.data.rows.row import BadRow, short
from rlhf_core.jobs import DataSettings, Purpose

LONGEST_NAME = 200  # characters of a name that are looked at
MAX_NOTES = 100  # different notes that a count holds, for files with endless names
FURTHER = "further columns not used"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name whose last word is one of these, or whose first word is one of the second set, says
# something about a row or a message; it is not a part of it.
_ABOUT = _words(
    "id ids uuid idx index row hash md sha key num nb count counts len length lengths size tokens "
    "score scores rating ratings rank ranks reward rewards logprob logprobs logp logps perplexity "
    "ppl probability confidence quality complexity difficulty level toxicity toxic moderation "
    "redacted model models source sources origin dataset datasource subset split config type types "
    "kind category categories task tasks domain topic topics subject field tag tags lang language "
    "languages locale country time date timestamp created updated version url link license licence "
    "author annotator annotators annotation annotations worker user metadata meta info stats "
    "statistics header headers status state correct correctness verified usage cost price title "
    "extra answer filename name format"
)
_ABOUT_FIRST = _words("id is score rating avg mean")
_COUNTS = _words("num n nb count counts number has contains")  # of images too
_FLAGS = _words("train trainable training trained loss masked learn learnable")
_WEIGHTS = _words("weight weights mask masks")
_LABELS = _words("label labels kto desirable preferred preference better winner thumb thumbs")

# Kind -> the words that show it, and what to do about such a column or key.
_MEANINGS: dict[str, tuple[frozenset[str], str]] = {
    "media": (
        _words(
            "image images img imgs picture pictures photo photos video videos audio audios speech "
            "pixel pixels frames"
        ),
        "images, video and audio are not supported",
    ),
    "template": (
        _words("template kwargs enable effort"),
        "options of the chat template are not supported",
    ),
    "tools": (
        _words("tool tools function functions observation"),
        "tool use is not supported",
    ),
    "reasoning": (
        _words(
            "reasoning thinking thought thoughts think cot rationale rationales scratchpad analysis"
        ),
        "reasoning is read only inside the reply's text: put it there in the form that the model "
        "writes, such as <think>...</think>",
    ),
    "system": (
        _words("system persona personas developer character profile"),
        "if it is the system message, set columns: {system: NAME}",
    ),
    "prompt": (
        _words(
            "context contexts history input inputs passage passages document documents doc docs "
            "background knowledge evidence choices options demonstrations shots hint hints premise "
            "hypothesis prefix suffix article articles paragraph paragraphs excerpt snippet table "
            "schema facts constraint constraints examples instruction instructions prompt prompts "
            "query question questions dialog dialogue text messages conversation conversations"
        ),
        "if it belongs to the prompt, put it into the prompt's text (format alpaca reads such a "
        "column after the instruction: columns: {input: NAME})",
    ),
    "reply": (
        _words(
            "chosen rejected completion completions response responses output outputs reply "
            "replies assistant generation generations candidate candidates continuation"
        ),
        "a single reply is read from completion, a pair from chosen and rejected; set format or "
        "columns",
    ),
}
_FLAG_TEXT = "only the weights 0 and 1 of single messages are read"
_LABEL_TEXT = (
    "if it says whether the reply is good, write true or false (or 1, 0) and set format: unpaired"
)
_SPEAKER = "speakers and channels are not read; put the name into the message's text"
_IN_MESSAGES = dict.fromkeys(
    ("name", "speaker", "speaker_name", "user_name", "recipient", "channel"), _SPEAKER
)
_IN_ROWS = {
    "role": "if the row is a single message, put whole conversations into rows; if it is a "
    "persona, set columns: {system: role}"
}
_UNSUPPORTED = frozenset({"media", "tools", "template"})
# What says nothing about a prompt, so that it may stand beside one in a set of prompts.
_OF_REPLIES = frozenset({"flag", "label", "reply", "reasoning"})


@dataclass(slots=True)
class Rules:
    """What rows are read for, and what may be left unread.

    Attributes:
        ignored: names of columns and of keys in messages that the settings ignore.
        carried: columns that a later step reads.
        notes: remark -> number of rows; counts what is not read.
        remarks: those of the row that is being read.
    """

    purpose: Purpose
    ignored: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    notes: Counter[str] = field(default_factory=Counter)
    remarks: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, settings: DataSettings, purpose: Purpose, notes: Counter[str]) -> Rules:
        """The rules of a data set."""
        names = frozenset(carried(settings, purpose))
        return cls(purpose, frozenset(settings.ignore_columns), names, notes)

    def count(self) -> None:
        """Count the row's remarks; endless different ones share a count."""
        for remark in self.remarks:
            full = remark not in self.notes and len(self.notes) >= MAX_NOTES
            self.notes[FURTHER if full else remark] += 1
        self.remarks.clear()


def is_empty(value: Any, levels: int = 8) -> bool:
    """Whether a value says nothing: null, NaN, an empty text, or a collection of such values, as
    far as ``levels`` inside it."""
    if value is None:
        return True
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")  # as tables without lists hold them
    if isinstance(value, float):
        return math.isnan(value)
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | list | tuple) and (
        levels > 0 and all(is_empty(item, levels - 1) for item in items)
    )


@functools.lru_cache(maxsize=1024)
def _meaning(name: str) -> tuple[str, str]:
    """The kind of a name ("" for nothing known), and what to do about its value."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    found = frozenset(words)
    if words and (words[0] in _COUNTS or words[-1] in _COUNTS):
        return "about", ""
    if found & _MEANINGS["media"][0]:
        return "media", _MEANINGS["media"][1]
    if words and (words[0] in _ABOUT_FIRST or words[-1] in _ABOUT):
        return "about", ""
    if name.lower() in _FLAGS or words[:1] == ["train"] or found & _WEIGHTS:
        return "flag", _FLAG_TEXT
    if found & _LABELS:
        return "label", _LABEL_TEXT
    for kind, (known, todo) in _MEANINGS.items():
        if found & known:
            return kind, todo
    return "", ""


def is_part(name: str) -> bool:
    """Whether a column of this name may hold a part of a prompt or a reply."""
    return _meaning(name[:LONGEST_NAME])[0] in ("prompt", "reply")


def _refusal(name: str, value: Any, purpose: Purpose, message: bool) -> str | None:
    """Why an unread value forbids to use its row; "" if it does not, None if it says nothing."""
    if is_empty(value):
        return None
    kind, todo = _meaning(name[:LONGEST_NAME])
    if special := (_IN_MESSAGES if message else _IN_ROWS).get(name):
        return special
    collection = isinstance(value, list | tuple | Mapping)
    if kind == "about" or (purpose == "prompts" and kind in _OF_REPLIES):
        return ""
    if kind == "flag":
        return None if read_flag(value) else todo
    if kind == "label":
        return todo
    if kind == "template":
        return todo
    if kind:  # numbers and yes or no are no part of a conversation
        return todo if collection or isinstance(value, str) else ""
    return "lists and objects may be a part of the conversation" if collection else ""


def read_flag(value: Any) -> bool | None:
    """A weight or a flag as True (the usual one), False (0: not trained on) or None (neither)."""
    if isinstance(value, str):
        value = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}.get(
            value.strip().lower()
        )
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def check_unread(
    values: Mapping[str, Any],
    names: Iterable[str],
    rules: Rules,
    where: str = "",
    harmless: tuple[str, ...] = (),
) -> None:
    """Count columns or keys that are not read.

    Args:
        names: those of ``values`` that are not read.
        where: the message that holds them; empty: they are columns.
        harmless: names that say nothing here.

    Raises:
        BadRow: some change what the row means.
    """
    refused: dict[str, str] = {}
    what = "key" if where else "column"
    for name in names:
        if name in rules.carried and not where:
            continue
        if name in rules.ignored:
            if not is_empty(values[name]):
                rules.remarks.add(f"{what} {short(name)} ignored (ignore_columns)")
            continue
        why = _refusal(name, values[name], rules.purpose, bool(where))
        why = why and "" if name in harmless else why
        if why:
            refused[name] = why
        elif why is not None:
            rules.remarks.add(f"{what} {short(name)} not used")
    if refused:
        raise unread(values, refused, where)


def unread(values: Mapping[str, Any], refused: Mapping[str, str], where: str = "") -> BadRow:
    """The error for values that matter and are not read; ``refused`` is name -> what to do."""
    shown = list(refused)[:8]
    first = shown[0]
    found = f"key {short(first)} of {where}" if where else f"column {short(first)}"
    others = ", ".join(short(name) for name in shown[1:])
    also = f" (also {others})" if others else ""
    plain = [name if re.fullmatch(r"[\w.-]{1,40}", name) else short(name) for name in shown]
    unsupported = any(_meaning(name[:LONGEST_NAME])[0] in _UNSUPPORTED for name in refused)
    return BadRow(
        "unsupported" if unsupported else "unused_column",
        f"{found} holds {short(values[first])}, which is not read here and may change what the row "
        f"means{also}: {refused[first].replace('NAME', plain[0])}. If the rows are right "
        f"without it, set ignore_columns: [{', '.join(plain)}]",
    )
