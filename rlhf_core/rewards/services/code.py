"""Code in a reply, run with the row's tests by a SandboxFusion service (bytedance/SandboxFusion,
POST /run_code). Nothing is run in this process or on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import httpx

from rlhf_core.errors import DataError
from rlhf_core.jobs.reward_services import CodeReward
from rlhf_core.rewards.services.answer import Answer, Item, Question
from rlhf_core.rewards.services.http import OwnService

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.S)


class CodeScorer(OwnService):
    """Asks a sandbox. The score is the share of the tests that end without an error."""

    def __init__(self, settings: CodeReward) -> None:
        super().__init__(settings, "The code sandbox")
        self.settings = settings

    def question(self, item: Item) -> Question:
        """The code and the tests.

        Raises:
            DataError: the row has no tests.
        """
        tests = tests_of(item.row.get(self.settings.column))
        if not tests:
            raise DataError(
                f"The reward code needs tests in column '{self.settings.column}' of each prompt; "
                f"row {item.row.get('row', '?')} has none. Fill it in, or name the column that has "
                f"them (data.prompts.columns: {{{self.settings.column}: ...}})."
            )
        return {"code": code_in(item.reply), "tests": tests}

    def ask(self, client: httpx.Client, questions: list[Question]) -> list[Answer]:
        """One request for each test: there is one question. A reply without code gets 0."""
        (question,) = questions
        if not question["code"]:
            return [Answer(0.0, failure="code_missing")]
        passed = [self._passes(client, question["code"], test) for test in question["tests"]]
        return [Answer(sum(passed) / len(passed))]

    def _passes(self, client: httpx.Client, code: str, test: str) -> bool:
        settings = self.settings
        program, passed = f"{code}\n\n{test}\n", ""
        if settings.language == "python":  # a reply that leaves early has not passed
            passed = "passed " + hashlib.sha256(program.encode("utf-8", "replace")).hexdigest()
            program += f"print()\nprint({passed!r})\n"
        body = {
            "code": program,
            "language": settings.language,
            "compile_timeout": settings.run_timeout,
            "run_timeout": settings.run_timeout,
            "memory_limit_MB": settings.memory_mb,
        }

        def read(reply: httpx.Response) -> tuple[str, bool | None]:
            return read_run(reply, passed)

        return self.post(client, f"{settings.url}/run_code", body, read)


def code_in(reply: str) -> str:
    """The last fenced block of a reply; empty without one."""
    found = _BLOCK.findall(reply)
    return found[-1].strip("\n") if found else ""


def tests_of(value: Any) -> list[str]:
    """The tests in a column: one text, or those of a JSON list of texts."""
    text = str(value or "")
    try:
        several = json.loads(text)
    except ValueError:
        several = None
    if isinstance(several, list) and all(isinstance(test, str) for test in several):
        return [test for test in several if test.strip()]
    return [text] if text.strip() else []


def read_run(reply: httpx.Response, last_line: str) -> tuple[str, bool | None]:
    """Whether a run of SandboxFusion succeeded; its own errors are worth another try.

    Args:
        last_line: that the program must have printed; empty: none.
    """
    try:
        value = reply.json()
        status, message = value["status"], str(value.get("message") or "")
        printed = str((value.get("run_result") or {}).get("stdout") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        shown = " ".join(reply.text.split())[:200]
        return f"the answer is not one of SandboxFusion's: {shown!r}", None
    if status in ("Success", "Failed"):
        return "", status == "Success" and printed.rstrip().endswith(last_line)
    return f"the sandbox failed ({status}): {' '.join(message.split())[:200]}", None
