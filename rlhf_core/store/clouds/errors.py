"""Classifies obstore's failures: transient, missing key, write conflict, or an error for the user.

Its exceptions hold no reply, so the HTTP status and the service's code are read from the text.
"""

from __future__ import annotations

import os
import re

from rlhf_core.errors import StoreError, StoreUnavailable
from rlhf_core.store.clouds.cloud import Cloud

_NO_PLACE = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "ResourceNotFound"}
_FULL = {"InsufficientStorage", "AccountCapacityExceeded", "QuotaExceeded"}
_NO_REPLY = (
    "error sending request", "error decoding response", "body error", "timed out", "timeout",
    "connection closed", "connection reset",
)  # fmt: skip


def text_of(error: BaseException) -> str:
    """The message in one line, without obstore's listing of its internal state."""
    return " ".join(str(error).partition("Debug source")[0].split())


def status_of(error: BaseException) -> int:
    """The HTTP status; 0 without a reply."""
    found = re.search(r"status code: (\d{3})", text_of(error))
    return int(found[1]) if found else 0


def code_of(error: BaseException) -> str:
    """The service's error code, such as ``BlobNotFound``; empty for a HEAD."""
    found = re.search(r"<Code>(\w+)</Code>", text_of(error))
    return found[1] if found else ""


def is_missing(error: BaseException) -> bool:
    """Whether the key does not exist (a HEAD cannot tell that from a missing bucket)."""
    return code_of(error) not in _NO_PLACE and (
        isinstance(error, FileNotFoundError) or status_of(error) == 404
    )


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional write failed because another writer was faster."""
    return type(error).__name__ in ("AlreadyExistsError", "PreconditionError")


def is_past_end(error: BaseException) -> bool:
    """Whether a range starts after the end of the value."""
    return status_of(error) == 416


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed when it is retried."""
    if _about_credentials(error) or "certificate" in str(error):
        return False
    if status := status_of(error):
        return status in (408, 429) or (status >= 500 and status not in (501, 507))
    return any(words in text_of(error).lower() for words in _NO_REPLY)


def _about_credentials(error: BaseException) -> bool:
    text = text_of(error)
    asked = "token request" in text or "169.254.169.254" in text  # of the machine's identity
    refused = type(error).__name__ == "UnauthenticatedError"  # by the storage itself
    return asked or ("redential" in text and not refused and not status_of(error))


def to_store_error(error: BaseException, cloud: Cloud, bucket: str, action: str) -> StoreError:
    """A StoreError that says what failed and what to do about it.

    Args:
        action: what the request did, such as "reading".
    """
    where = f"{cloud.place} {bucket!r} at {cloud.endpoint_name}"
    found = _account_problem(error, cloud, where, action) or _reply_problem(error, where, action)
    return found or _transport_problem(error, cloud, where, action)


def _account_problem(
    error: BaseException, cloud: Cloud, where: str, action: str
) -> StoreError | None:
    """Missing or refused credentials, or a missing bucket."""
    code, status = code_of(error), status_of(error)
    if _about_credentials(error):
        return StoreUnavailable(
            f"no usable credentials of {cloud.name} for {where} ({_clean(error, cloud)}): "
            f"{cloud.credentials}"
        )
    if code in _NO_PLACE or isinstance(error, FileNotFoundError):
        return StoreUnavailable(
            f"there is no {where}: create the {cloud.place}, or correct RLHF_STORE"
        )
    if status in (401, 403) or type(error).__name__ in (
        "PermissionDeniedError",
        "UnauthenticatedError",
    ):
        return StoreUnavailable(
            f"{where} refused {action} ({code or status}): check the credentials, and that they "
            f"may read, write, list and delete there; {cloud.credentials}"
        )
    return None


def _reply_problem(error: BaseException, where: str, action: str) -> StoreError | None:
    """A server that is full or fails; None without such a reply."""
    code, status = code_of(error), status_of(error)
    if status == 507 or code in _FULL:
        return StoreUnavailable(f"{where} is full ({code or status}): free some space there")
    if status >= 500 or status in (408, 429):
        return StoreUnavailable(
            f"{where} failed at {action} ({code or status}), and again on every retry: try again "
            "later, and look at the service's status"
        )
    return None


def _transport_problem(error: BaseException, cloud: Cloud, where: str, action: str) -> StoreError:
    """Why no reply came: TLS, a timeout, the network, or anything else."""
    text = str(error).lower()
    if "certificate" in text:
        return StoreUnavailable(
            f"the TLS certificate of {where} is not trusted: name its authority in SSL_CERT_FILE, "
            "or set RLHF_STORE_TLS_VERIFY=false on a network you trust"
        )
    if "timed out" in text or "timedout" in text:
        return StoreUnavailable(
            f"{where} did not answer in time at {action}: check the network and "
            f"{cloud.endpoints[0]}; on a slow link raise RLHF_STORE_READ_TIMEOUT"
        )
    if is_transient(error):
        return StoreUnavailable(
            f"{where} cannot be reached at {action}: check that this machine can reach it, the "
            f"name, and {cloud.endpoints[0]}"
        )
    kind = StoreError if status_of(error) else StoreUnavailable
    return kind(
        f"{where} failed at {action}: {type(error).__name__}: {_clean(error, cloud)}; check "
        f"RLHF_STORE, {cloud.endpoints[0]} and the credentials"
    )


def _clean(error: BaseException, cloud: Cloud) -> str:
    """The error's text without secrets: those of the environment, and the queries of addresses,
    which hold an Azure signature."""
    text = re.sub(r"\?\S+", "?…", text_of(error))[:400]
    for name in cloud.secrets:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text
