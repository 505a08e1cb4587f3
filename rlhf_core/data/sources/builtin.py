"""Data sets that come with the project's dependencies: nothing to download.

`builtin:chatterbot` is the chatterbot corpus (PyPI package chatterbot_corpus, BSD): short
human-written conversations in 28 languages. `subset` is a language, optionally with categories:
"english", "chinese", "english:emotion,conversations". `builtin:sums`: see `sums`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
from collections.abc import Iterator
from typing import Any

from rlhf_core.data.rows.row import RawRow
from rlhf_core.data.sources import sums
from rlhf_core.errors import DataError

NAMES = ("chatterbot", "sums")

# In these categories the lines after the first are alternative answers to it; in the others they
# are a dialogue.
_ALTERNATIVES = {"computer", "computers", "emociones", "emotion", "emotions"}


def version(name: str) -> str:
    """Version of the package that a built-in set is read from.

    Raises:
        DataError: unknown name, or the package is not installed.
    """
    if name not in NAMES:
        known = ", ".join(f"builtin:{known}" for known in NAMES)
        raise DataError(f"There is no built-in data set {name!r}; the known ones are {known}.")
    if name == "sums":
        return sums.VERSION
    try:
        return importlib.metadata.version("chatterbot-corpus")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "builtin:chatterbot needs the package chatterbot-corpus; pip install chatterbot-corpus"
        ) from None


def languages() -> list[str]:
    """The languages of the chatterbot corpus."""
    return sorted(entry.name for entry in _root().iterdir() if entry.is_dir())


def is_subset(subset: str) -> bool:
    """Whether a subset is one of the built-in set; False where its package is not installed."""
    return subset in sums.SUBSETS or (
        importlib.util.find_spec("chatterbot_corpus") is not None
        and subset.partition(":")[0] in languages()
    )


def _root() -> Any:
    return importlib.resources.files("chatterbot_corpus") / "data"


def files(name: str, subset: str | None) -> list[tuple[str, Any]]:
    """Category files of a subset: (name for messages, readable resource), sorted.

    Args:
        subset: "<language>" or "<language>:<category>,..."; None: english.

    Raises:
        DataError: unknown data set, language or category; the text lists the known ones.
    """
    version(name)
    language, _, wanted = (subset or "english").partition(":")
    known = languages()
    if language not in known:
        raise DataError(
            f"builtin:{name} has no language {language!r}; subset is one of "
            f"{', '.join(known)}, optionally with categories as in "
            "english:emotion,conversations."
        )
    found = {
        entry.name.removesuffix(".yml"): entry
        for entry in (_root() / language).iterdir()
        if entry.name.endswith(".yml")
    }
    categories = [part.strip() for part in wanted.split(",") if part.strip()] or sorted(found)
    if unknown := [category for category in categories if category not in found]:
        raise DataError(
            f"builtin:{name} has no category {', '.join(unknown)} in {language}; the categories "
            f"are {', '.join(sorted(found))}."
        )
    return [(f"{name}:{language}/{category}.yml", found[category]) for category in categories]


def rows(name: str, subset: str | None) -> Iterator[RawRow]:
    """The conversations as rows of format `messages`, numbered within their category.

    A question with several answers becomes one row per answer. Raises as `files`.
    """
    import yaml

    if name == "sums":
        yield from sums.rows(subset)
        return
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar stays a text
    for shown, resource in files(name, subset):
        category = shown.rpartition("/")[2].removesuffix(".yml")
        data = yaml.load(resource.read_text(encoding="utf-8"), Loader=loader)
        for number, lines in enumerate(data["conversations"], 1):
            if not isinstance(lines, list) or len(lines) < 2:
                yield RawRow(shown, number, None, dropped="not_a_conversation")
                continue
            texts = [str(line).strip() for line in lines]
            # "who is X", answer, "who is X", answer: two conversations that share a list.
            again = len(texts) == 4 and texts[0] == texts[2]
            if category in _ALTERNATIVES:
                pairs = [[texts[0], answer] for answer in texts[1:]]
            else:
                pairs = [texts[:2], texts[2:]] if again else [texts]
            for pair in pairs:
                yield RawRow(shown, number, _conversation(pair))


def _conversation(texts: list[str]) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[position % 2], "content": text} for position, text in enumerate(texts)
        ]
    }
