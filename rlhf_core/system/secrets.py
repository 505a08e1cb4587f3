"""Keeps secrets of the environment out of logs, records and messages.

Credentials are never part of a job or of a configuration. Output of libraries and of users' code
passes through `redact` before it is written.
"""

from __future__ import annotations

import os
import re

REDACTED = "***"
MIN_LENGTH = 8  # characters; redacting a shorter value would hit ordinary words
_NAMES = re.compile(
    r"SECRET|TOKEN|PASSW|API_?KEY|PRIVATE_?KEY|CREDENTIAL|AUTH_STRING|DATABASE_CONNECTION_URL"
    r"|_KEY$",
    re.I,
)
_IN_URL = re.compile(r"(?<=\w://)([^\s/@:]+:[^\s/@]+)@")
_HARMLESS = re.compile(r"^TOKENIZERS_|_FILE$|_PATH$", re.I)


def secrets() -> list[str]:
    """The values of this process's environment that are secrets by their names, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and _NAMES.search(name) and not _HARMLESS.search(name)
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """Replace the secrets of this process's environment, and users with passwords in URLs, by ***;
    what a URL shows is hidden in the rest of the text too, such as a library's own words."""
    for secret in secrets():
        text = text.replace(secret, REDACTED)
    for login in sorted(set(_IN_URL.findall(text)), key=len, reverse=True):
        text = text.replace(login, REDACTED)
        password = login.partition(":")[2]
        if len(password) >= MIN_LENGTH:
            text = text.replace(password, REDACTED)
    return text
