"""Keeps secrets of the environment out of logs, records and messages.

Credentials are never part of a job or of a configuration. Output of libraries and of users' code
passes through `redact` before it is written.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, unquote

REDACTED = "***"
MIN_LENGTH = 8  # characters; redacting a shorter value would hit ordinary words
_NAMES = re.compile(
    r"SECRET|TOKEN|PASSW|API_?KEY|PRIVATE_?KEY|CREDENTIAL|AUTH_STRING|DATABASE_CONNECTION_URL"
    r"|_KEY$",
    re.I,
)
# A login before the host: a user with a password, which may hold a slash as keys of S3 do (a port
# is none), or a long token alone.
_IN_URL = re.compile(r"(?<=\w://)([^\s/@:]*:(?!\d+/)[^\s@]+|[^\s/@:]{16,})@")
# What stands behind these words is a secret, whatever it is: signed URLs, headers, tokens.
_NAMED = re.compile(
    r"([?&;][\w-]*(?:signature|credential|token|secret|passw(?:or)?d|api_?key|access_?key(?:_?id)?)"
    r"=|\bsig=|\bbearer\s+(?=\S{8})|\bauthorization['\"]?\s*[:=]\s*['\"]?(?:basic\s+|token\s+)?"
    r"(?!bearer\b)(?=\S{8}))[^\s&;\"'<>,]+",
    re.I,
)
_TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16})\b")
_HARMLESS = re.compile(r"^TOKENIZERS_|_FILE$|_PATH$", re.I)


def secrets() -> list[str]:
    """The values of this process's environment that are secrets by their names, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and names_a_secret(name)
    }
    return sorted(found, key=len, reverse=True)


def names_a_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _NAMES.search(name) is not None and not _HARMLESS.search(name)


def redact(text: str) -> str:
    """Replace secrets by ***: those of this process's environment, logins in URLs, signatures and
    tokens in URLs and headers. What a URL shows is hidden in the rest of the text too, such as a
    library's own words, also as a URL writes it (%2F for a slash)."""
    for secret in secrets():
        text = _without(text, secret)
    for login in sorted(set(_IN_URL.findall(text)), key=len, reverse=True):
        text = text.replace(login, REDACTED)
        password = unquote(login.partition(":")[2] or login)
        if len(password) >= MIN_LENGTH:
            text = _without(text, password)
    return _TOKENS.sub(REDACTED, _NAMED.sub(rf"\g<1>{REDACTED}", text))


def _without(text: str, secret: str) -> str:
    for written in (secret, quote(secret, safe=""), quote(secret), quote_plus(secret)):
        text = text.replace(written, REDACTED)
    return text
