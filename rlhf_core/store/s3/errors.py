"""Classifies S3 failures: transient, missing key, write conflict, or an error for the user."""

from __future__ import annotations

import os
from typing import Any

from rlhf_core.errors import StoreError, StoreUnavailable

_TRANSIENT_CODES = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "ConditionalRequestConflict",
    "OperationAborted",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}
_FULL_CODES = {"XMinioStorageFull", "QuotaExceeded", "XRGWQuotaExceeded", "InsufficientCapacity"}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}


def response_of(error: BaseException) -> dict[str, Any]:
    """The server's reply in an exception of botocore or s3fs; {} if there was none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return response
        seen = seen.__cause__
    return {}


def code_of(error: BaseException) -> str:
    """The S3 error code, such as ``NoSuchKey``; for a HEAD only a number, such as ``404``."""
    return str(response_of(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    """The HTTP status; 0 without a reply."""
    return int(response_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: BaseException) -> bool:
    """Whether the key does not exist (a HEAD cannot tell that from a missing bucket)."""
    if code_of(error) == "NoSuchBucket":
        return False
    return code_of(error) == "NoSuchKey" or status_of(error) == 404


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional write failed because another writer was faster."""
    return code_of(error) == "PreconditionFailed" or status_of(error) == 412


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed when it is retried."""
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, IncompleteReadError, SSLError

    status = status_of(error)
    if status:
        return code_of(error) in _TRANSIENT_CODES or (
            (status >= 500 and status not in (501, 507)) or status == 429
        )
    if isinstance(error, SSLError):
        return False
    transport = (NoConnection, HTTPClientError, IncompleteReadError, TimeoutError)
    return isinstance(error, (*transport, ConnectionError))


def to_store_error(error: BaseException, *, bucket: str, endpoint: str, action: str) -> StoreError:
    """A StoreError that says what failed and what to do about it.

    Args:
        action: what the request did, such as "reading".
    """
    where = f"bucket {bucket!r} at {endpoint}"
    found = _account_problem(error, where) or _reply_problem(error, where, action)
    return found or _transport_problem(error, where, endpoint, action)


def _account_problem(error: BaseException, where: str) -> StoreError | None:
    """Missing credentials, profile or bucket."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError, ProfileNotFound

    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return StoreUnavailable(
            f"no AWS credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "name a profile in RLHF_STORE_PROFILE"
        )
    if isinstance(error, ProfileNotFound):
        return StoreUnavailable(
            f"{_clean(error)} (for {where}): correct RLHF_STORE_PROFILE or AWS_PROFILE"
        )
    if code_of(error) == "NoSuchBucket":
        return StoreUnavailable(
            f"there is no {where}: create the bucket, or correct RLHF_STORE and RLHF_STORE_ENDPOINT"
        )
    return None


def _reply_problem(error: BaseException, where: str, action: str) -> StoreError | None:
    """What the server replied; None when it did not reply."""
    code, status = code_of(error), status_of(error)
    if status in (401, 403):
        return StoreUnavailable(
            f"{where} refused {action} ({code or status}): check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or RLHF_STORE_PROFILE), and that this key may read, write, "
            "list and delete there"
        )
    if status == 301 or code in _REGION_CODES:
        return StoreUnavailable(
            f"{where} is in another region ({code or status}): set RLHF_STORE_REGION"
        )
    if status == 507 or code in _FULL_CODES:
        return StoreUnavailable(f"{where} is full ({code or status}): free some space there")
    if status in (405, 501):
        operation = getattr(error, "operation_name", action)
        return StoreError(
            f"{where} does not have the operation {operation} ({code or status}), which {action} "
            "needs: use a server that has it, such as AWS S3, MinIO, Ceph or SeaweedFS"
        )
    if status >= 500:
        return StoreUnavailable(
            f"{where} failed at {action} ({code or status}), and again on every retry: often its "
            "disk is full; see the server's log, or set RLHF_STORE_ENDPOINT to another server"
        )
    if status:
        return StoreError(f"{where} failed at {action} with {code or status}: {_clean(error)}")
    return None


def _transport_problem(error: BaseException, where: str, endpoint: str, action: str) -> StoreError:
    """Why no reply came: TLS, a timeout, the network, or anything else."""
    from botocore.exceptions import BotoCoreError, SSLError

    if isinstance(error, SSLError):
        return StoreUnavailable(
            f"the TLS certificate of {endpoint} is not trusted: set AWS_CA_BUNDLE to its "
            "authority, or RLHF_STORE_TLS_VERIFY=false on a network you trust"
        )
    if isinstance(error, TimeoutError) or "imeout" in type(error).__name__:
        return StoreUnavailable(
            f"{where} did not answer in time at {action}: check that the server runs and that "
            "RLHF_STORE_ENDPOINT names it; on a slow link raise RLHF_STORE_READ_TIMEOUT"
        )
    if is_transient(error):
        return StoreUnavailable(
            f"{where} cannot be reached ({type(error).__name__}) at {action}: check that the "
            "server runs, that RLHF_STORE_ENDPOINT names it and that this machine can reach it"
        )
    kind = StoreUnavailable if isinstance(error, (BotoCoreError, ValueError)) else StoreError
    return kind(
        f"{where} failed at {action}: {type(error).__name__}: {_clean(error)}; check "
        "RLHF_STORE_ENDPOINT, RLHF_STORE_REGION and the AWS configuration"
    )


def _clean(error: BaseException) -> str:
    """The error's text without the secrets of the environment."""
    text = str(error)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text
