"""What the name of a column, or of a key in a message, says about a value that no format reads."""

from __future__ import annotations

import functools
import re

LONGEST_NAME = 200  # characters of a name that are looked at


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name whose last word is one of these, or whose first word is one of the second set, says
# something about a row or a message; it is not a part of it.
_ABOUT = _words(
    "id ids uuid idx index row hash md sha ip key num nb count counts len length lengths size "
    "token tokens score scores rating ratings rank ranks reward rewards logprob logprobs logp "
    "logps perplexity ppl probability confidence quality complexity difficulty level toxicity "
    "toxic detoxify moderation guard redacted model models engine provider generator source "
    "sources origin repo commit path dump dataset datasets datasource subset split fold config "
    "configs configuration params parameters seed mode type types kind category categories "
    "subcategory task tasks domain topic topics subject subreddit field tag tags intent ability "
    "skill skills lang language languages locale country region state date time timestamp year "
    "created updated version release url uri link license licence author annotator annotators "
    "annotation annotations worker judge user metadata meta info stats statistics header headers "
    "status correct correctness valid verified usage cost price title extra answer truth solution "
    "critique comment agent channel platform filename name format train training rate fingerprint "
    "script"
)
_ABOUT_FIRST = _words("id is score rating avg mean used finish stop created updated")
_COUNTS = _words("num n nb count counts number has contains")  # of images too

# Settings of the request that a reply came from, in logs of an API.
_REQUEST = _words("tool_choice parallel_tool_calls response_format")

_FLAGS = _words("train trainable training trained loss learn learnable")
_NOT = _words(
    "no not mask masked ignore ignored skip skipped without exclude excluded freeze frozen"
)
_BETWEEN = _words("is was do does to should be on in for use calculate compute calc apply message")
_WEIGHTS = _words("weight weights mask masks")
_LABELS = _words(
    "label labels kto desirable preferred preference better winner thumb thumbs vote verdict"
)
# A yes under a name of the first kind, or a no under one of the second: not to be learned from.
_SPOILT = _words(
    "deleted removed spam bad wrong invalid incorrect discard discarded dropped rejected tie tied "
    "flip flipped swap swapped ignore ignored skip skipped exclude excluded"
)
_SOUND = _words("good correct right valid accepted approved chosen selected")

_MEANINGS: dict[str, tuple[frozenset[str], str]] = {
    "media": (
        _words(
            "image images img imgs picture pictures photo photos video videos audio audios speech "
            "pixel pixels frames attachment attachments"
        ),
        "images, video and audio are not supported",
    ),
    "target": (
        _words("target targets"),
        "if it belongs to the prompt, put it into the prompt's text; if it is the reply, set "
        "columns: {completion: NAME}",
    ),
    "template": (
        _words("template kwargs enable effort"),
        "options of the chat template are not supported",
    ),
    "tools": (
        _words("tool tools function functions observation"),
        "tools are read from the column tools (set columns: {tools: NAME}), calls from tool_calls "
        "of a reply, results from messages of the role tool",
    ),
    "reasoning": (
        _words(
            "reasoning reason reasons thinking thought thoughts think cot rationale rationales "
            "scratchpad analysis explanation explanations"
        ),
        "reasoning is read only inside the reply's text: put it there in the form that the model "
        "writes, such as <think>...</think>",
    ),
    "system": (
        _words("system sys persona personas developer character profile"),
        "if it is the system message, set columns: {system: NAME}",
    ),
    "prompt": (
        _words(
            "context contexts history input inputs passage passages document documents doc docs "
            "background knowledge evidence choices options demonstrations shots hint hints premise "
            "hypothesis prefix suffix article articles paragraph paragraphs excerpt snippet table "
            "schema facts constraint constraints examples instruction instructions prompt prompts "
            "query question questions problem dialog dialogue text messages conversation "
            "conversations code file files previous earlier reference references"
        ),
        "if it belongs to the prompt, put it into the prompt's text, or let it follow the prompt "
        "with columns: {instruction: <the prompt's column>, input: NAME}",
    ),
    "reply": (
        _words(
            "chosen rejected completion completions response responses output outputs reply "
            "replies assistant generation generations candidate candidates continuation answers "
            "summary bot gpt final attempt"
        ),
        "a single reply is read from completion, a pair from chosen and rejected; set format or "
        "columns, or write the rows so",
    ),
}  # fmt: skip
_FLAG_TEXT = "only the weights 0 and 1 of single messages are read"
_LABEL_TEXT = (
    "if it says whether the reply is good, write true or false (or 1, 0) and set format: unpaired"
)
_SPOILT_TEXT = "it may say that the row is not to be learned from; if so, take such rows out"
_SOUND_TEXT = (
    "it may say that the reply is not good; if so, set columns: {label: NAME}, which makes it the "
    "reply's label"
)


@functools.lru_cache(maxsize=1024)
def meaning(name: str) -> tuple[str, str]:
    """What a name says, and what to do about its value.

    Returns:
        (kind, advice). The kind is about (harmless); flag, or not_flag where yes means "not
        trained on"; label, spoilt or sound (a verdict on the row); the part of a row that it may
        be (media, tools, reasoning, system, prompt, reply ...); or "" for an unknown name.
    """
    name = name[:LONGEST_NAME]
    if name in _REQUEST:
        return "about", ""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    found = frozenset(words) | {*re.findall("[a-z]+", name.lower())}
    if words[1:] and (len(words[-1]) == 1 or (words[-1] == "code" and words[-2] in _ABOUT)):
        words.pop()  # model_a, language_code
    if words and (words[0] in _COUNTS or words[-1] in _COUNTS):
        return "about", ""
    for kind in ("media", "target"):
        if found & _MEANINGS[kind][0]:
            return kind, _MEANINGS[kind][1]
    if known := _verdict(words):
        return known
    if words and (words[0] in _ABOUT_FIRST or words[-1] in _ABOUT):
        return "about", ""
    if found & _WEIGHTS:
        return "flag", _FLAG_TEXT
    if found & _LABELS:
        return "label", _LABEL_TEXT
    for kind, (parts, todo) in _MEANINGS.items():
        if found & parts:
            return kind, todo
    return "", ""


def _verdict(words: list[str]) -> tuple[str, str] | None:
    """The kind of a name that consists of the words of a flag or of a verdict alone."""
    found = frozenset(words)
    if words == ["masked"] or (found & _FLAGS and found <= _FLAGS | _NOT | _BETWEEN):
        return ("not_flag" if found & _NOT else "flag"), _FLAG_TEXT
    if words[:1] == ["train"]:
        return "flag", _FLAG_TEXT
    if words in (["chosen"], ["rejected"]):
        return None  # replies
    if found & _SPOILT and found <= _SPOILT | _BETWEEN:
        return "spoilt", _SPOILT_TEXT
    if found & _SOUND and found <= _SOUND | _BETWEEN:
        return "sound", _SOUND_TEXT
    return None


def is_part(name: str) -> bool:
    """Whether a column of this name may hold a part of a prompt or a reply."""
    return meaning(name)[0] in ("", "target", "prompt", "reply")
