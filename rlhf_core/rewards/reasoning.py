"""The reasoning_gym reward: the verifiers of reasoning-gym's tasks (arXiv 2505.24760).

The verifiers run in a child process, because some evaluate the reply, and a reply such as
9**9**9**9 never finishes. Such a child is killed, and the next reply gets a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.jobs.rewards import ReasoningGymReward
from rlhf_core.rewards.patterns import compile_pattern, extract
from rlhf_core.system.processes import python_path

INSTALL = 'run: pip install "rlhf-pipeline[reasoning]" (or pip install reasoning-gym)'
START_SECONDS = 120.0  # for the import of the package, on a busy machine


def is_installed() -> bool:
    """Whether the package reasoning-gym is installed."""
    return find_spec("reasoning_gym") is not None


def reasoning_score(
    rule: ReasoningGymReward, seed: int, failures: Counter[str]
) -> Callable[[list[str], list[dict[str, Any]]], list[float]]:
    """A function of replies and rows that returns the verifiers' scores, 0 to 1.

    Args:
        seed: for the tasks' objects; the verifiers use the row.
        failures: counts verifier_timeout and verifier_error, for which a reply gets 0, and
            regex_timeout.

    Raises:
        ConfigError: the package is not installed.
    """
    if not is_installed():
        raise ConfigError(f"The reward reasoning_gym needs the package reasoning-gym; {INSTALL}")
    pattern = compile_pattern(rule.pattern) if rule.pattern is not None else None
    child = Verifier(seed)

    def one(reply: str, row: dict[str, Any]) -> float:
        task = _task(row)
        if task is None:
            if rule.without_answer is not None:
                return float(rule.without_answer)
            raise DataError(
                f"The reward reasoning_gym needs prompts of reasoning-gym; row "
                f"{row.get('row', '?')} is not one: its column 'extra' has "
                f"{str(row.get('extra') or '')[:60]!r}. Set data.prompts.source to "
                "reasoning-gym:TASK, or the reward's without_answer."
            )
        given = reply if pattern is None else extract(pattern, reply, failures)
        if given is None:
            return 0.0
        score, failure = child.score({**task, "answer": given}, rule.time_limit)
        if failure:
            failures[failure] += 1
        return score

    return lambda replies, rows: [one(*pair) for pair in zip(replies, rows, strict=True)]


def _task(row: dict[str, Any]) -> dict[str, Any] | None:
    """The task, its options and the entry that a row holds, as `rlhf_core.data.sources.reasoning`
    wrote them."""
    try:
        extra = json.loads(row.get("extra") or "null")
    except (ValueError, RecursionError):
        return None
    found = extra.get("reasoning_gym") if isinstance(extra, dict) else None
    return found if isinstance(found, dict) and {"task", "options", "entry"} <= set(found) else None


class Verifier:
    """A child process (verifier.py) that replies to one line of JSON with another."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._process: subprocess.Popen[bytes] | None = None

    def score(self, request: dict[str, Any], seconds: float) -> tuple[float, str]:
        """The score of a request, and the name of a failure or "".

        Args:
            request: {task, options, entry, answer}.
            seconds: time limit.

        Raises:
            ConfigError: the package cannot be imported, or has no such task.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        line = json.dumps({**request, "seed": self._seed}) + "\n"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
            answer = self._read(seconds)
        except (BrokenPipeError, EOFError):  # out of memory, or a crash in a C library
            self.close()
            return 0.0, "verifier_error"
        if answer is None:
            self.close()
            return 0.0, "verifier_timeout"
        if "config" in answer:
            raise ConfigError(f"reasoning-gym: {answer['config']}")
        return float(answer["score"]), "verifier_error" if answer.get("error") else ""

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_core.rewards.verifier", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path()},
        )
        atexit.register(self.close)
        self._rest = b""
        try:
            ready = self._read(START_SECONDS)
        except EOFError:
            ready = {"config": "its process ended at once; try: python -c 'import reasoning_gym'"}
        if ready is None or "config" in ready:
            self.close()
            why = ready["config"] if ready else f"it did not start within {START_SECONDS:g} s"
            raise ConfigError(f"reasoning-gym: {why}")
        return self._process

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The child's next line; None after a timeout. Raises EOFError if the child has ended."""
        assert self._process is not None and self._process.stdout is not None
        stream, end = self._process.stdout.fileno(), time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                if not (part := os.read(stream, 65536)):
                    raise EOFError
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Kill the child process."""
        process, self._process = self._process, None
        atexit.unregister(self.close)
        if process is not None:
            process.kill()
            process.communicate()
