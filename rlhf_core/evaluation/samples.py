"""samples.jsonl: every prompt with each model's reply."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def prompt_text(messages: str) -> str:
    """A prompt as text for people: its only user turn, or the whole conversation."""
    turns = [m for m in json.loads(messages) if m["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in turns)


def write_samples(
    path: Path,
    prompts: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """One line per prompt: prompt, each model's reply, and each judge's scores.

    Args:
        scores: reward, gold -> model -> a score for each prompt.
    """
    with path.open("w") as file:
        for i, prompt in enumerate(prompts):
            line: dict[str, Any] = {"prompt": prompt}
            line |= {name: texts[name][i] for name in texts}
            for judge, by_model in scores.items():
                if by_model:
                    line[judge] = {name: round(s[i], 4) for name, s in by_model.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
