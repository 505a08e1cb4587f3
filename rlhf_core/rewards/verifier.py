"""The child process that runs reasoning-gym's verifiers; see reasoning.py.

It reads lines of JSON {task, options, entry, answer, seed}, and writes {score}, {score, error} or
{config}.
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
    """Answer requests from standard input until it ends. The argument is the parent's pid."""
    die_with_parent()  # a busy child does not notice a closed pipe
    if os.getppid() != int(sys.argv[1]):
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keep the output of tasks apart

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import reasoning_gym  # noqa: F401
    except Exception as error:
        send({"config": f"importing it failed ({type(error).__name__}: {error})"})
        return
    send({"ready": True})
    for line in sys.stdin.buffer:
        send(answer(json.loads(line)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: the score; 0 with the error if the verifier raises."""
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
