"""Columns and keys that a format does not read: each is harmless, ignored by a setting, or refused.

    harmless   empty values; numbers and dates; values whose name says something about a row (id,
               source, category, score ...); the data card counts them
    refused    names that change what a row means (images, tools, weight, history, reasoning ...),
               and texts, lists and objects under unknown names
    ignored    what the setting `ignore_columns` names

The decision depends on names and kinds of values, never on their size, so that one row of a file is
not refused for what another one passes with.
"""

from __future__ import annotations

import datetime
import json
import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.dataset.carried import carried
from rlhf_core.data.rows.meanings import meaning
from rlhf_core.data.rows.row import BadRow, short
from rlhf_core.jobs import DataSettings, Purpose

MAX_NOTES = 100  # different notes that a count holds, for files with endless names
FURTHER = "further columns not used"
_NO_WORDS = (numbers.Number, datetime.date, datetime.time, datetime.timedelta)
_FLAG_TEXTS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
_SPEAKER = "speakers and channels are not read; put the name into the message's text"
_IN_MESSAGES = dict.fromkeys(
    ("name", "speaker", "speaker_name", "user_name", "recipient", "channel"), _SPEAKER
) | dict.fromkeys(
    ("prefix", "partial"),
    "the reply is only begun, and its end of turn would be trained on too; write it to its end",
)
_IN_ROWS = {
    "role": "if the row is a single message, put whole conversations into rows; if it is a "
    "persona, set columns: {system: role}"
}
_UNSUPPORTED = frozenset({"media", "tools", "template"})
# What says nothing about a prompt, so that it may stand beside one in a set of prompts.
_OF_REPLIES = frozenset(
    {"flag", "not_flag", "label", "spoilt", "sound", "reply", "reasoning", "target"}
)
_PARTS = frozenset({"target", "system", "prompt", "reply", "label", "sound"})
_IN_TEXT = "if it belongs to the message, put it into the message's text"
_UNKNOWN = (
    "it may be a part of the conversation; if it is, put it there, or rename it with the setting "
    "columns"
)
_FOR_REWARDS = "; if a reward needs it, set columns: {extra: NAME}"


@dataclass(slots=True)
class Rules:
    """What rows are read for, and what may be left unread.

    Attributes:
        ignored: names of columns and of keys in messages that the settings ignore.
        carried: columns that a later step reads.
        notes: remark -> number of rows; counts what is not read.
        remarks: those of the row that is being read. reasoning: a key of it that holds reasoning,
            as errors name it.
    """

    purpose: Purpose
    ignored: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    notes: Counter[str] = field(default_factory=Counter)
    remarks: set[str] = field(default_factory=set)
    reasoning: str = ""

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


def names_in(value: Any, wanted: Set[str]) -> Iterator[str]:
    """Those of some names that are keys in a value, at any level; also in a text that holds JSON,
    as tables have them."""
    if isinstance(value, Mapping):
        yield from wanted & value.keys()
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from names_in(item, wanted)
    elif isinstance(value, str) and value[:1] in ("[", "{"):
        yield from (name for name in wanted if json.dumps(name) in value)


def read_flag(value: Any) -> bool | None:
    """A yes or no: a weight, a flag or a label. None if the value is neither.

    Yes and no are true and false, 1 and 0 (1.0 and 0.0 too, as tables with gaps hold them), or one
    of these as a text in any case, as in .csv files.
    """
    if isinstance(value, str):
        return _FLAG_TEXTS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _refusal(name: str, value: Any, purpose: Purpose, message: bool, document: bool) -> str | None:
    """Why an unread value forbids to use its row; "" if it does not, None if it says nothing.

    Args:
        message: the name is a key of a message. document: the row is one text, without turns.
    """
    if is_empty(value):
        return None
    special = (_IN_MESSAGES if message else _IN_ROWS).get(name)
    if special and not (isinstance(value, bool) and not value):
        return special
    kind, todo = meaning(name)
    todo = _IN_TEXT if message and kind in _PARTS else todo
    if kind == "about" or (purpose == "prompts" and kind in _OF_REPLIES):
        return ""
    if kind == "reasoning" and isinstance(value, str) and value.strip().lower() in ("on", "off"):
        return ""  # a switch, as in Nemotron's data; the reasoning itself stands in the reply
    if kind in ("flag", "not_flag"):
        return None if read_flag(value) is (kind == "flag") else todo
    if kind in ("label", "template") or (kind == "media" and value is not False):
        return todo
    flag = read_flag(value) if kind in ("spoilt", "sound") else None
    if flag is not None:
        return "" if flag is (kind == "sound") else todo
    values = value if isinstance(value, list | tuple) and not kind else [value]
    if all(isinstance(one, _NO_WORDS) for one in values):
        return ""  # no part of a conversation
    if kind in ("", "spoilt", "sound"):
        if document and isinstance(value, str):
            return ""
        return _IN_TEXT if message else _UNKNOWN + _FOR_REWARDS * (purpose == "prompts")
    return todo


def check_unread(
    values: Mapping[str, Any],
    names: Iterable[str],
    rules: Rules,
    where: str = "",
    harmless: tuple[str, ...] = (),
    document: bool = False,
) -> None:
    """Count columns or keys that are not read.

    Args:
        names: those of ``values`` that are not read.
        where: the message that holds them; empty: they are columns.
        harmless: names that say nothing here.
        document: the row is one text, without turns.

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
        why = _refusal(name, values[name], rules.purpose, bool(where), document)
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
    unsupported = any(meaning(name)[0] in _UNSUPPORTED for name in refused)
    return BadRow(
        "unsupported" if unsupported else "unused_column",
        f"{found} holds {short(values[first])}, which is not read here and may change what the row "
        f"means{also}: {refused[first].replace('NAME', plain[0])}. If the rows are right "
        f"without it, set ignore_columns: [{', '.join(plain)}]",
    )
