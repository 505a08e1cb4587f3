"""What a model's name stands for: candidates, one champion, and those that were it before.

    models/<name>/log/<number>.json     a transition; created once, never changed
    models/<name>/<time>-<digest>.json  a publication from before there was a log

The state is what the transitions amount to, in their order. A writer reads the log to its end,
decides, and creates the record with the next number; where another was first it reads and decides
again. So transitions at one moment come one after the other whatever the clocks say, and a writer
that was killed has left a whole one or none. Each record names the champion after it, which is all
that most readers want.

Publications without a log count as promotions; the first writer takes them over into the log, and
later ones too, should an older version of this program go on publishing.
"""

from __future__ import annotations

import difflib
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from rlhf_core.errors import ArtifactNotFound, ConfigError, StoreError
from rlhf_core.store.store import Store
from rlhf_core.store.versions import (
    LIVED,
    Model,
    Transition,
    digest_of,
    fold,
    number_of,
    read_end,
    read_log,
)

ATTEMPTS = 200
"""Times that a writer may lose to others before it gives up; each loss is another's success."""


def model_names(store: Store) -> list[str]:
    """Names that have a version, sorted."""
    return sorted({path.split("/")[1] for path in store.list_records("models/")})


def champion(store: Store, name: str) -> str | None:
    """Digest of the published artifact of a name; None where nothing was promoted."""
    end = read_end(store, name)
    if end.late and (record := store.read_record(end.late[-1])) is not None:
        return digest_of(record, end.late[-1])
    return str(end.last.get("champion") or "") or None


def newest_champion(store: Store) -> str | None:
    """Digest of the champion that became it last, of all names; None where there is none."""
    found = [read_model(store, name) for name in model_names(store)]
    changes = [
        (last.time, model.champion.digest)
        for model in found
        if model.champion
        for last in [t for t in model.history if t.action in LIVED][-1:]
    ]
    return max(changes)[1] if changes else None


def read_model(store: Store, name: str) -> Model:
    """All versions of a name.

    Raises:
        ArtifactNotFound: nobody published or kept anything under that name.
    """
    model = read_log(store, name)[0] if "/" not in name else None
    if model is not None and model.versions:
        return model
    known = model_names(store)
    close = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ArtifactNotFound(
        f"There is no model {name!r} in {store.url}.{hint} Models: {', '.join(known) or 'none'}."
    )


def promote(
    store: Store, name: str, digest: str, *, run: str = "", reason: str = ""
) -> Transition | None:
    """Make an artifact the champion of a name; the one that was it is archived.

    Returns:
        What was written; None when it was the champion already.

    Raises:
        ArtifactNotFound, ArtifactCorrupt: the artifact is not there, or not whole.
    """

    def decide(model: Model) -> Transition | None:
        if model.champion and model.champion.digest == digest:
            return None
        return Transition(0, "promote", digest, run, reason=reason)

    with store.holding(digest):
        return _write(store, name, decide)


def add_candidate(
    store: Store, name: str, digest: str, *, run: str = "", reason: str = ""
) -> Transition | None:
    """Keep an artifact under a name without publishing it; the champion stays.

    Returns and raises as `promote`; a champion does not become a candidate.
    """

    def decide(model: Model) -> Transition | None:
        version = model.version(digest)
        if version and (
            version.state == "champion"
            or (version.state == "candidate" and version.reason == reason)
        ):
            return None
        return Transition(0, "candidate", digest, run, reason=reason)

    with store.holding(digest):
        return _write(store, name, decide)


def rollback(store: Store, name: str, *, reason: str = "") -> Transition:
    """Make the champion before this one champion again.

    Raises:
        ArtifactNotFound: there was none before, or its artifact is gone.
        StoreError: somebody else changed the champion meanwhile: look again, then decide.
    """
    model = read_model(store, name)
    now = model.champion
    if now is None or len(model.champions) < 2:
        was = f"version {now.number} is the first one" if now else "it has none"
        raise ArtifactNotFound(
            f"{name} had no champion before this one ({was}); `rlhf models promote {name} VERSION` "
            "publishes any version."
        )
    before = model.champions[-2]

    def decide(current: Model) -> Transition | None:
        if current.champions != model.champions:
            found = current.champion
            raise StoreError(
                f"The champion of {name} changed while it was to be rolled back from version "
                f"{now.number}: it is version {found.number if found else 'none'} now. Nothing "
                f"was done; look with `rlhf models show {name}` and try again."
            )
        return Transition(0, "rollback", before, reason=reason)

    try:
        with store.holding(before):
            written = _write(store, name, decide)
    except ArtifactNotFound as error:
        version = model.version(before)
        raise ArtifactNotFound(
            f"The champion of {name} before this one, version {version.number if version else '?'},"
            f" is gone from the store ({error}); `rlhf models list {name}` shows what is there, "
            f"`rlhf models promote {name} VERSION` publishes it."
        ) from error
    assert written is not None
    return written


def archive(store: Store, name: str, digest: str, *, reason: str = "") -> Transition | None:
    """Give up a candidate: a collection of garbage may delete it some day.

    Returns:
        What was written; None when it was archived already.

    Raises:
        ConfigError: it is the champion.
    """

    def decide(model: Model) -> Transition | None:
        version = model.version(digest)
        if version is not None and version.state == "champion":
            raise ConfigError(
                f"Version {version.number} is the champion of {name}; promote another one, or roll "
                "back, and it is archived by that."
            )
        if version is not None and version.state == "archived":
            return None
        return Transition(0, "archive", digest, reason=reason)

    return _write(store, name, decide)


def kept_digests(store: Store, archived: int) -> set[str]:
    """Digests that a collection of garbage keeps: of every name the champion, the candidates and
    the last so many that were archived."""
    found: set[str] = set()
    for name in model_names(store):
        model = read_log(store, name)[0]
        found |= {v.digest for v in model.versions if v.state != "archived"}
        found |= set(model.archived[max(0, len(model.archived) - archived) :])
    return found


def _write(
    store: Store, name: str, decide: Callable[[Model], Transition | None]
) -> Transition | None:
    """Append what ``decide`` makes of the state, or nothing."""
    for _ in range(ATTEMPTS):
        model, end = read_log(store, name)
        number = number_of(end.paths[-1]) + 1 if end.paths else 1
        told: Transition | None = None
        if end.late:  # these first, in a record of their own
            last = [t for t in model.history if t.number == 0]
            value: dict[str, Any] = {"versions": [_plain(t) for t in last]}
            after = model
        else:
            told = decide(model)
            if told is None:
                return None
            told = replace(
                told, number=number, time=datetime.now(UTC).isoformat(timespec="microseconds")
            )
            value = _plain(told)
            after = fold(name, [*model.history, told])
        value |= {
            "id": uuid.uuid4().hex,  # two writers' records differ, whatever they say
            "name": name,
            "champion": after.champion.digest if after.champion else "",
            "taken": end.late[-1] if end.late else str(end.last.get("taken") or ""),
        }
        path = f"models/{name}/log/{number:08}.json"
        if not store.write_record(path, value, create=True):
            time.sleep(random.uniform(0, 0.05))
        elif told is not None:
            return told
    raise StoreError(
        f"the log of {name} in {store.url} could not be appended to: {ATTEMPTS} times somebody "
        "else was first, or the store does not show what was written; try again"
    )


def _plain(told: Transition) -> dict[str, Any]:
    return {
        "action": told.action, "digest": told.digest, "run": told.run, "time": told.time,
        "reason": told.reason,
    }  # fmt: skip
