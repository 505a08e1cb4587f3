"""A small package with the name and the interface of reasoning-gym, for what its real tasks do only
by chance: hang, crash, print, and entries that JSON changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

INIT = """
import os, sys, time
from .factory import DATASETS

class Task:
    def __init__(self, name, size, seed, fixed=None):
        self.name, self.size, self.seed, self.fixed = name, size, seed, fixed
        assert fixed is None or fixed > 0, "fixed must be positive"

    def __getitem__(self, index):
        value = self.fixed or self.seed * 100 + index
        if self.name == "word_ladder":
            print("a task may print")
            value = f"{hash('word')} {value}"
        return {"question": f"Say {value}.", "answer": str(value), "metadata": {"pair": (1, 2)}}

    def score_answer(self, answer, entry):
        print("a task may print")
        if self.name == "tuples":
            return float(isinstance(entry["metadata"]["pair"], tuple))
        if self.name == "anything":
            return 1.0
        if self.name == "prefix":
            return float(entry["answer"].startswith(answer))
        if answer == "hang":
            time.sleep(600)
        if answer == "die":
            os._exit(1)
        if answer == "raise":
            raise ZeroDivisionError("odd reply")
        if answer == "two":
            return 2.0
        return 1.0 if answer == entry["answer"] else 0.05

def create_dataset(name, **options):
    if name not in DATASETS:
        raise ValueError(f"Dataset '{name}' not registered")
    return Task(name, **options)
"""


@pytest.fixture
def gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, in this process and in its children."""
    root = tmp_path / "site"
    (root / "reasoning_gym").mkdir(parents=True)
    (root / "reasoning_gym" / "__init__.py").write_text(INIT)
    (root / "reasoning_gym" / "factory.py").write_text(
        "DATASETS = dict.fromkeys(['anything', 'prefix', 'say', 'tuples', 'word_ladder'])\n"
    )
    info = root / "reasoning_gym-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 9.9\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(root)
    monkeypatch.setenv("PYTHONPATH", str(root))
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        del sys.modules[name]
