"""Opening a source: its rows, from files, the Hugging Face hub, a built-in set or the store."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_core.data.rows.row import RawRow
from rlhf_core.data.sources import builtin, reasoning
from rlhf_core.data.sources.files import find_files, s3_error
from rlhf_core.data.sources.hub import hub_rows
from rlhf_core.data.sources.kind import FEEDBACK, source_kind
from rlhf_core.data.sources.readers import read_file
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings
from rlhf_core.store import Store, open_store


def open_rows(
    settings: DataSettings,
    store: Store | None = None,
    fingerprint: str = "",
    left_out: dict[str, str] | None = None,
) -> Iterator[RawRow]:
    """All rows of the source, in order; a bounded part is in memory at a time.

    Args:
        store: holds the votes and thumbs; None: the store of the environment.
        fingerprint: of the votes, thumbs or hub data set to read, without what came later; empty:
            all, or the newest.
        left_out: files beside the data that are not read are added: name -> why.

    Raises:
        DataError: the source does not exist or is damaged beyond single rows.
        StoreUnavailable: S3 or the hub cannot be reached.
    """
    kind = source_kind(settings.source)
    check_settings(settings, kind)
    if kind == "builtin":
        yield from builtin.rows(settings.source.removeprefix("builtin:"), settings.subset)
    elif kind == "reasoning":
        yield from reasoning.rows(settings.source)
    elif kind == "feedback":
        yield from FEEDBACK[settings.source].rows(store or open_store(), fingerprint)
    elif kind == "hub":
        yield from hub_rows(settings, fingerprint)
    else:
        found = find_files(settings)
        if left_out is not None:
            left_out.update(found.left_out)
        for file in found.files:
            with file.open() as stream:
                try:
                    yield from read_file(stream, file.name)
                except OSError as error:
                    raise (
                        s3_error(file.name, error)
                        if kind == "s3"
                        else DataError(f"{file.name}: reading failed ({error.strerror or error}).")
                    ) from error


def check_settings(settings: DataSettings, kind: str) -> None:
    """Check that the settings that choose a part of a source have an effect.

    Args:
        kind: of the source, as `source_kind` returns it.

    Raises:
        DataError: one is set and has none.
    """
    if kind == "hub":
        return
    given = {"revision": settings.revision}
    if settings.split != "train":
        given["split"] = settings.split
    # A preset's subset of the built-in set stays when only the source is set.
    if kind != "builtin" and settings.subset and not builtin.is_subset(settings.subset):
        given["subset"] = settings.subset
    for name, value in given.items():
        if value:
            raise DataError(
                f"{settings.source}: {name} ({value}) has no effect on this source, only on a hub "
                "data set. Remove it, or name the files of that part in source."
            )
