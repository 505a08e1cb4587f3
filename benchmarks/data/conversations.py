"""Writes conversations for the benchmark: the same bytes wherever the pinned packages are.

    python -m benchmarks.data.conversations FILE MEGABYTES

Questions are those of the chatterbot corpus, three of four in English; replies are paragraphs of
docstrings of the pinned packages, which hold prose, lists and code. Every second conversation has
one turn, the others up to six; a third begins with one of a few system prompts.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.data.sources import builtin

PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "prefect")
TURNS = (1, 1, 1, 1, 2, 2, 3, 6)
SYSTEM_PROMPTS = 12
SHARE_WITH_SYSTEM = 1 / 3
_TOKEN = re.compile(r"<[\w|]+>")  # SmolLM2 has special tokens such as <filename>


def write(path: Path, megabytes: float) -> int:
    """Write about so many megabytes (10**6 bytes) of JSON lines; returns the number of rows."""
    rows = written = 0
    with path.open("wb") as file:
        for conversation in conversations():
            written += file.write(json.dumps(conversation, ensure_ascii=False).encode() + b"\n")
            rows += 1
            if written >= megabytes * 10**6:
                return rows
    raise AssertionError("conversations are endless")


def conversations() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Endless rows of format `messages`."""
    chosen = random.Random(0)
    replies, english, foreign = paragraphs(), questions(True), questions(False)
    systems = [" ".join(text.split()) for text in chosen.sample(replies, SYSTEM_PROMPTS)]
    while True:
        messages = []
        if chosen.random() < SHARE_WITH_SYSTEM:
            messages.append({"role": "system", "content": chosen.choice(systems)})
        for _ in range(chosen.choice(TURNS)):
            question = chosen.choice(english if chosen.random() < 0.75 else foreign)
            if chosen.random() < 0.5:
                question += "\n\n" + chosen.choice(replies)
            count = chosen.choice((1, 1, 2, 3))
            reply = "\n\n".join(chosen.choice(replies) for _ in range(count))
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply})
        yield {"messages": messages}


def questions(english: bool) -> list[str]:
    """The first lines of the corpus' conversations, in English or in the other languages."""
    languages = [name for name in builtin.languages() if (name == "english") == english]
    rows = (row for language in languages for row in builtin.rows("chatterbot", language))
    return [row.data["messages"][0]["content"] for row in rows if not row.dropped]


@functools.cache
def paragraphs() -> list[str]:
    """Different paragraphs of docstrings, 40 to 2,000 characters each."""
    found: dict[str, None] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            for text in _docstrings(path):
                for part in text.split("\n\n"):
                    if 40 <= len(part.strip()) <= 2000 and not _TOKEN.search(part):
                        found[part.strip()] = None
    return list(found)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield text


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]), float(sys.argv[2])):,} rows")
