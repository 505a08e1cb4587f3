"""The child process in which reasoning-gym's verifiers run; see reasoning.py.

Lines of JSON: {task, options, entry, answer, seed} in, {score} or {score, error} or {config} out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from rlhf_core.system.processes import die_with_parent


def main() -> None:
    die_with_parent()  # a busy child sees no closed pipe
    if os.getppid() != int(sys.argv[1]):
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a task prints is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import reasoning_gym  # noqa: F401
    except Exception as error:
        say({"config": f"importing it failed ({type(error).__name__}: {error})"})
        return
    say({"ready": True})
    for line in sys.stdin.buffer:
        say(answer(json.loads(line)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The score; 0 with the error where the verifier raises, as some do for odd replies."""
    try:
        verify = _verifier(request["task"], json.dumps(request["options"]), request["seed"])
    except Exception as error:
        return {"config": f"task {request['task']}: {error}"}
    try:
        score = float(verify(request["answer"], request["entry"]))
    except Exception as error:
        return {"score": 0.0, "error": f"{type(error).__name__}: {error}"}
    if not 0.0 <= score <= 1.0:
        return {"score": 0.0, "error": f"the verifier gave {score}"}
    return {"score": score}


@cache
def _verifier(task: str, options: str, seed: int) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    made = reasoning_gym.create_dataset(task, **{"size": 1, "seed": seed, **json.loads(options)})
    return made.score_answer  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
