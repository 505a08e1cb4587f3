"""Keys that come in the environment must not go into logs, records and messages.

Nothing here is a setting: credentials are never part of a job or of a configuration. What a library
or a person's own code prints is passed through `hide` before it is written down.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SHORTEST = 8  # characters; a shorter value would blot out ordinary words
_NAMES = re.compile(
    r"SECRET|TOKEN|PASSW|API_?KEY|PRIVATE_?KEY|CREDENTIAL|AUTH_STRING|DATABASE_CONNECTION_URL"
    r"|_KEY$",
    re.I,
)
_IN_URL = re.compile(r"(\w://)[^\s/@:]+:[^\s/@]+@")
_HARMLESS = re.compile(r"^TOKENIZERS_|_FILE$|_PATH$", re.I)


def secrets() -> list[str]:
    """The values of this process's environment that are secrets by their names, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _NAMES.search(name) and not _HARMLESS.search(name)
    }
    return sorted(found, key=len, reverse=True)


def hide(text: str) -> str:
    """A text without the secrets of this process's environment and without passwords in URLs."""
    for secret in secrets():
        text = text.replace(secret, HIDDEN)
    return _IN_URL.sub(rf"\1{HIDDEN}@", text)
