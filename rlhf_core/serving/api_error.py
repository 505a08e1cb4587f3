"""Errors of the API in OpenAI's form, and pydantic's errors in it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError


class ApiError(Exception):
    """An error that the client is told about.

    Args:
        text: what was found, what is needed.
        param: the parameter that is at fault.
        code: as OpenAI's, such as context_length_exceeded.
    """

    def __init__(
        self, text: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(text)
        self.text, self.param, self.code, self.status = text, param, code, status

    @property
    def value(self) -> dict[str, Any]:
        """The object under `error`."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": self.text, "type": kind, "param": self.param, "code": self.code}

    @property
    def body(self) -> bytes:
        """The response's JSON."""
        return json.dumps({"error": self.value}).encode()


def unsupported(param: str | None) -> ApiError:
    """The server has nothing to obey this parameter with."""
    text = f"{param} is not supported here; leave it out. docs/serving.md lists what is."
    return ApiError(text, param=param, code="unsupported_parameter")


def from_validation(error: ValidationError) -> ApiError:
    """The first of a request's faults; unknown parameters come first."""
    faults = error.errors(include_url=False, include_context=False)
    fault = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    param = _path(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return unsupported(param)
    if fault["type"] == "missing":
        return ApiError(f"{param} is missing.", param=param, code="missing_required_parameter")
    if fault["type"] == "json_invalid":
        return ApiError(f"The body is not JSON: {fault['msg']}.", code="invalid_json")
    found = repr(fault["input"])
    found = found if len(found) <= 80 else found[:80] + "..."
    text = f"{param or 'The body'}: {fault['msg'].removeprefix('Value error, ')} (found {found})."
    return ApiError(text, param=param, code="invalid_value")


def _path(parts: tuple[int | str, ...]) -> str | None:
    """`messages[0].content` of ("messages", 0, "content"); None of ()."""
    named = [part for part in parts if part != "[key]"]  # pydantic's mark of a dictionary's key
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named)
    return path.removeprefix(".") or None
