"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf_core.data.rows.row import RawRow
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataSettings

_SECONDS = 5.0


def hub_rows(settings: DataSettings) -> Iterator[RawRow]:
    """All rows of a split, in order, as they are downloaded. Errors as `open_rows`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name = f"hub:{settings.source}/{settings.split}"
    try:
        stream = datasets.load_dataset(
            settings.source,
            settings.subset,
            split=settings.split,
            revision=settings.revision,
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


def hub_answers(settings: DataSettings) -> str:
    """Why the hub cannot be asked for a data set, within seconds; empty when it can.

    Reading itself repeats its requests for half a minute before it gives up.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(settings.source, revision=settings.revision, timeout=_SECONDS)
    except Exception as error:
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError"):
            return (
                f"{settings.source}: the Hugging Face hub cannot be reached ({error}), and there "
                "is no such local file; check the network and HF_ENDPOINT, or give a local path."
            )
    return ""


def hub_commit(settings: DataSettings) -> str:
    """The commit that the revision names, or the revision when the hub cannot be asked."""
    revision = settings.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(settings.source, revision=revision, timeout=_SECONDS)
        return info.sha or revision
    except Exception:  # offline, gated or unknown: check_source says so
        return revision
