"""The model registry: per model name, candidates, one champion and archived versions.

    models/<name>/log/<number>.json     a transition; created once, never changed
    models/<name>/<time>-<digest>.json  a publication from before the log existed

The state follows from the transitions in their order. A writer reads the log to its end, decides,
and creates the record with the next number; if another writer was faster, it reads and decides
again. So concurrent transitions are ordered without clocks, and a killed writer leaves a complete
record or none. Each record names the champion after it, so most readers read only the last one.
It also has the champion's order among those of all names: one more than the largest that its writer
saw (Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978).

Publications without a log count as promotions. The next writer merges them into the log, including
those that an older version of this program adds later.
"""

from __future__ import annotations

import difflib
import logging
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError, StoreError
from rlhf_core.store.store import Store
from rlhf_core.store.versions import (
    CHAMPION_ACTIONS,
    LogEnd,
    Model,
    Transition,
    digest_of,
    fold,
    number_of,
    read_end,
    read_log,
)

log = logging.getLogger("rlhf_core.store")

ATTEMPTS = 200
"""How often a writer retries after losing a race; each loss is another writer's success."""


def model_names(store: Store) -> list[str]:
    """All model names, sorted."""
    return sorted({path.split("/")[1] for path in store.list_records("models/")})


def champion(store: Store, name: str) -> str | None:
    """Digest of the published artifact of a name; None if no version was promoted."""
    end = read_end(store, name)
    if end.unmerged:
        return digest_of(store.read_record(end.unmerged[-1]) or {}, end.unmerged[-1])
    return str(end.last.get("champion") or "") or None


def newest_champion(store: Store) -> str | None:
    """Digest of the most recently promoted champion of all names; None if there is none. Models
    whose log cannot be read are left out, with a warning."""
    found = [change for name in model_names(store) if (change := _last_change(store, name))]
    return max(found)[-1] if found else None


def _last_change(store: Store, name: str) -> tuple[int, str, str] | None:
    """Order, time and digest of a name's champion. The time is empty unless the order is 0, as in
    logs of before there were orders."""
    try:
        end = read_end(store, name)
        if not end.unmerged and (order := _order(end)):
            return order, "", str(end.last["champion"])
        model = read_log(store, name)[0]
    except ArtifactCorrupt as error:
        log.warning("%s", error)
        return None
    changes = [t for t in model.history if t.action in CHAMPION_ACTIONS]
    return (_order(end), changes[-1].time, changes[-1].digest) if changes else None


def _order(end: LogEnd) -> int:
    return int(end.last.get("order") or 0)


def _next_order(store: Store) -> int:
    """One more than the order of any champion, so that this one is the newest."""
    found = [change for name in model_names(store) if (change := _last_change(store, name))]
    return 1 + max((order for order, *_ in found), default=0)


def read_model(store: Store, name: str) -> Model:
    """All versions of a name.

    Raises:
        ArtifactNotFound: there is no version under that name.
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
    """Make an artifact the champion of a name; the previous champion is archived.

    Returns:
        The transition; None if the artifact was the champion already.

    Raises:
        ArtifactNotFound, ArtifactCorrupt: the artifact is missing or incomplete.
    """

    def choose(model: Model) -> Transition | None:
        if model.champion and model.champion.digest == digest:
            return None
        return Transition(0, "promote", digest, run, reason=reason)

    with store.holding(digest):
        return _write(store, name, choose)


def add_candidate(
    store: Store, name: str, digest: str, *, run: str = "", reason: str = ""
) -> Transition | None:
    """Register an artifact as a candidate; the champion stays.

    Returns and raises as `promote`. A champion does not become a candidate.
    """

    def choose(model: Model) -> Transition | None:
        version = model.version(digest)
        if version and (
            version.state == "champion"
            or (version.state == "candidate" and version.reason == reason)
        ):
            return None
        return Transition(0, "candidate", digest, run, reason=reason)

    with store.holding(digest):
        return _write(store, name, choose)


def rollback(store: Store, name: str, *, reason: str = "") -> Transition:
    """Make the previous champion the champion again.

    Raises:
        ArtifactNotFound: there is no previous champion, or its artifact is gone.
        StoreError: another writer changed the champion meanwhile.
    """
    model = read_model(store, name)
    now = model.champion
    if now is None or len(model.champions) < 2:
        cause = f"version {now.number} is the first one" if now else "it has no champion"
        raise ArtifactNotFound(
            f"{name} has no previous champion ({cause}); `rlhf models promote {name} VERSION` "
            "publishes any version."
        )
    before = model.champions[-2]

    def choose(current: Model) -> Transition | None:
        if current.champions != model.champions:
            found = current.champion
            raise StoreError(
                f"The champion of {name} changed during the rollback from version {now.number}: it "
                f"is version {found.number if found else 'none'} now. Nothing was changed; look "
                f"with `rlhf models show {name}` and try again."
            )
        return Transition(0, "rollback", before, reason=reason)

    try:
        with store.holding(before):
            written = _write(store, name, choose)
    except ArtifactNotFound as error:
        version = model.version(before)
        raise ArtifactNotFound(
            f"The previous champion of {name}, version {version.number if version else '?'}, is "
            f"gone from the store ({error}); `rlhf models list {name}` shows the versions, "
            f"`rlhf models promote {name} VERSION` publishes one."
        ) from error
    assert written is not None
    return written


def archive(store: Store, name: str, digest: str, *, reason: str = "") -> Transition | None:
    """Archive a version, so that a garbage collection may delete it later.

    Returns:
        The transition; None if the version was archived already.

    Raises:
        ConfigError: it is the champion.
    """

    def choose(model: Model) -> Transition | None:
        version = model.version(digest)
        if version is not None and version.state == "champion":
            raise ConfigError(
                f"Version {version.number} is the champion of {name}; promote another version, or "
                "roll back, which archives it."
            )
        if version is not None and version.state == "archived":
            return None
        return Transition(0, "archive", digest, reason=reason)

    return _write(store, name, choose)


def kept_digests(store: Store, archived: int) -> set[str]:
    """Digests that a garbage collection keeps.

    Args:
        archived: number of archived versions to keep per name, beside champion and candidates.
    """
    found: set[str] = set()
    for name in model_names(store):
        model = read_log(store, name)[0]
        found |= {v.digest for v in model.versions if v.state != "archived"}
        found |= set(model.archived[max(0, len(model.archived) - archived) :])
    return found


def _write(
    store: Store, name: str, choose: Callable[[Model], Transition | None]
) -> Transition | None:
    """Append the transition that ``choose`` returns for the current state, if any."""
    for _ in range(ATTEMPTS):
        model, end = read_log(store, name)
        number = number_of(end.paths[-1]) + 1 if end.paths else 1
        transition: Transition | None = None
        if end.unmerged:  # merged first, in a record of their own
            last = [t for t in model.history if t.number == 0]
            value: dict[str, Any] = {"versions": [_as_record(t) for t in last]}
            after = model
        else:
            transition = choose(model)
            if transition is None:
                return None
            transition = replace(
                transition, number=number, time=datetime.now(UTC).isoformat(timespec="microseconds")
            )
            value = _as_record(transition)
            after = fold(name, [*model.history, transition])
        value |= {
            "id": uuid.uuid4().hex,  # makes the records of two writers differ
            "name": name,
            "champion": after.champion.digest if after.champion else "",
            "order": _next_order(store)
            if transition and transition.action in CHAMPION_ACTIONS
            else _order(end),
            "taken": end.unmerged[-1] if end.unmerged else str(end.last.get("taken") or ""),
        }
        path = f"models/{name}/log/{number:08}.json"
        if not store.write_record(path, value, create=True):
            time.sleep(random.uniform(0, 0.05))
        elif transition is not None:
            return transition
    raise StoreError(
        f"appending to the log of {name} in {store.url} failed: another writer was faster "
        f"{ATTEMPTS} times, or the store does not show what was written; try again"
    )


def _as_record(transition: Transition) -> dict[str, Any]:
    return {
        "action": transition.action,
        "digest": transition.digest,
        "run": transition.run,
        "time": transition.time,
        "reason": transition.reason,
    }
