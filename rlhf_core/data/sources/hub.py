"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from rlhf_core.data.rows.row import RawRow
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataSettings

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi

HUB_SECONDS = 10.0  # within which the hub has to answer

Reply = TypeVar("Reply")


def ask_hub(request: Callable[[HfApi], Reply]) -> Reply:
    """The hub's reply to one request, without the client's half a minute of retries.

    Args:
        request: passes `timeout=HUB_SECONDS` on to the client.

    Raises:
        StoreUnavailable: there is no reply; the text says why, and names no repository.
        HfHubHTTPError: the hub refuses; a subclass tells a gated, private or unknown repository.
        HFValidationError: the repository's id is malformed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return request(HfApi())
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # whatever the HTTP library of the day raises
        raise StoreUnavailable(
            f"the Hugging Face hub cannot be reached ({type(error).__name__}: {error}); check the "
            "network and HF_ENDPOINT"
        ) from error


def hub_rows(settings: DataSettings, fingerprint: str = "") -> Iterator[RawRow]:
    """All rows of a split, in order, as they are downloaded. Errors as `open_rows`.

    Args:
        fingerprint: of the data set; the commit in it is read, even if the branch has moved on.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name = f"hub:{settings.source}/{settings.split}"
    try:
        stream = datasets.load_dataset(
            settings.source,
            settings.subset,
            split=settings.split,
            revision=fingerprint.rpartition("@")[2] or settings.revision,
            streaming=True,
        )
        for number, row in enumerate(stream, 1):
            yield RawRow(name, number, row)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{settings.source}: no such data set on the Hugging Face hub, and no such local file "
            f"({error}); check the id, or set HF_TOKEN if it is private or gated."
        ) from error
    except ValueError as error:  # unknown subset or split; the text lists what there is
        raise DataError(f"{settings.source}: {error}; check subset, split and revision.") from error
    except (OSError, ConnectionError) as error:
        raise StoreUnavailable(
            f"{settings.source}: the Hugging Face hub cannot be reached ({error}); check the "
            "network and HF_ENDPOINT, or give a local path."
        ) from error


def hub_problem(settings: DataSettings) -> str:
    """Why the hub cannot be reached for a data set; empty if it can."""
    try:
        _ask_for(settings)
    except StoreUnavailable as error:
        return f"{settings.source}: there is no such local file, and {error}, or give a local path."
    except Exception:  # the hub answers; reading the rows explains a refusal
        return ""
    return ""


def _ask_for(settings: DataSettings) -> DatasetInfo:
    return ask_hub(
        lambda hub: hub.dataset_info(
            settings.source, revision=settings.revision, timeout=HUB_SECONDS
        )
    )


def hub_commit(settings: DataSettings) -> str:
    """The commit of the revision; the revision itself if the hub does not answer."""
    revision = settings.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        return _ask_for(settings).sha or revision
    except Exception:  # offline, gated or unknown: check_source says so
        return revision
