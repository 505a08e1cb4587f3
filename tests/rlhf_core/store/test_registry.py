"""Candidates, champions and archived versions, on a folder and on a real S3 server."""

from __future__ import annotations

import threading
from datetime import datetime, tzinfo

import pytest

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError, StoreError
from rlhf_core.store import Store, open_store, registry
from rlhf_core.store.collect import Limits
from rlhf_core.store.versions import Model, number_of
from tests.rlhf_core.store.helpers import results_of

EVERYTHING = Limits(keep=-10, grace=-10)  # even what was written this moment counts as old


def made(store: Store, text: str) -> str:
    return store.publish_derived(kind="published", files={"config.json": text.encode()}).digest


def states(model: Model) -> str:
    """A letter for each version, in their order."""
    return "".join(version.state[:2] for version in model.versions)


def log(store: Store, name: str = "chat") -> list[dict[str, object] | None]:
    return [store.read_record(path) for path in store.list_records(f"models/{name}/log/")]


def publish_old(store: Store, digest: str, hour: int, run: str) -> None:
    """As versions before the log did it."""
    stamp = f"20260301T{hour:02}0000.000000Z"
    store.write_record(
        f"models/chat/{stamp}-{digest[:12]}.json",
        {"name": "chat", "digest": digest, "run": run, "time": stamp},
    )


def test_promotion_archives_the_champion_before(store: Store) -> None:
    a, b = made(store, "a"), made(store, "b")
    assert registry.champion(store, "chat") is None
    told = registry.promote(store, "chat", a, run="one")
    assert told is not None and (told.number, told.action, told.digest) == (1, "promote", a)
    assert registry.promote(store, "chat", a, run="again") is None
    registry.promote(store, "chat", b, run="two", reason="better")
    model = registry.read_model(store, "chat")
    assert registry.champion(store, "chat") == b == registry.newest_champion(store)
    assert [(v.number, v.digest, v.state, v.run, v.reason) for v in model.versions] == [
        (1, a, "archived", "one", ""),
        (2, b, "champion", "two", "better"),
    ]
    assert [t.number for t in model.history] == [1, 2]


def test_candidate_leaves_the_champion_and_can_be_promoted(store: Store) -> None:
    a, b = made(store, "a"), made(store, "b")
    registry.add_candidate(store, "chat", a, reason="max_kl is 9")
    assert registry.champion(store, "chat") is None is registry.newest_champion(store)
    registry.promote(store, "chat", b)
    assert registry.add_candidate(store, "chat", a, reason="max_kl is 9") is None  # as it is
    assert registry.add_candidate(store, "chat", b, reason="no") is None  # the champion
    assert states(registry.read_model(store, "chat")) == "cach"
    registry.promote(store, "chat", a)
    assert states(registry.read_model(store, "chat")) == "char"
    assert registry.champion(store, "chat") == a


def test_rolling_back_goes_through_the_champions_before(store: Store) -> None:
    a, b, c, d = (made(store, text) for text in "abcd")
    for digest in (a, b, c):
        registry.promote(store, "chat", digest)
    assert registry.rollback(store, "chat", reason="rude").digest == b
    assert registry.read_model(store, "chat").versions[2].state == "archived"
    assert registry.rollback(store, "chat").digest == a  # not c again
    registry.promote(store, "chat", d)
    assert registry.rollback(store, "chat").digest == a
    with pytest.raises(ArtifactNotFound, match="version 1 is the first one"):
        registry.rollback(store, "chat")
    assert registry.champion(store, "chat") == a


def test_rolling_back_to_what_is_gone_changes_nothing(store: Store) -> None:
    a, b = made(store, "a"), made(store, "b")
    registry.promote(store, "chat", a)
    registry.promote(store, "chat", b)
    store.delete(a)
    with pytest.raises(ArtifactNotFound, match=r"version 1, is gone .* `rlhf models list chat`"):
        registry.rollback(store, "chat")
    assert registry.champion(store, "chat") == b and len(log(store)) == 2


def test_what_is_not_whole_is_not_promoted(store: Store) -> None:
    a = made(store, "a")
    store._backend.delete(f"blobs/sha256/{(f := store.get(a).files[0].sha256)[:2]}/{f}")
    with pytest.raises(ArtifactCorrupt, match="has lost files"):
        registry.promote(store, "chat", a)
    with pytest.raises(ArtifactNotFound):
        registry.promote(store, "chat", "0" * 64)
    assert registry.model_names(store) == [] and store.list_records("leases/") == []


def test_unknown_names_and_versions_say_what_is_known(store: Store) -> None:
    with pytest.raises(ArtifactNotFound, match="Models: none"):
        registry.read_model(store, "chat")
    a = made(store, "a")
    registry.promote(store, "chat", a)
    with pytest.raises(ArtifactNotFound, match=r"no model 'chta' .*mean chat\? Models: chat"):
        registry.read_model(store, "chta")
    model = registry.read_model(store, "chat")
    for wanted in ("1", "v1", a[:6], a, f"published/{a[:12]}"):
        assert model.find(wanted).digest == a
    with pytest.raises(ArtifactNotFound, match=rf"Versions: 1 \({a[:12]}, champion\)"):
        model.find("2")


def test_champion_is_not_archived_but_a_candidate_is(store: Store) -> None:
    a, b = made(store, "a"), made(store, "b")
    registry.promote(store, "chat", a)
    registry.add_candidate(store, "chat", b)
    with pytest.raises(ConfigError, match="Version 1 is the champion"):
        registry.archive(store, "chat", a)
    registry.archive(store, "chat", b)
    assert registry.archive(store, "chat", b) is None
    assert states(registry.read_model(store, "chat")) == "char"


# --------------------------------------------------------------------------- stores of before


def test_publications_from_before_the_log_are_its_history(store: Store) -> None:
    a, b, c = (made(store, text) for text in "abc")
    publish_old(store, a, 1, "one")
    publish_old(store, b, 2, "two")
    publish_old(store, a, 3, "three")
    model = registry.read_model(store, "chat")
    assert registry.champion(store, "chat") == a and log(store) == []
    assert [(v.number, v.digest, v.state, v.run) for v in model.versions] == [
        (1, a, "champion", "one"),
        (2, b, "archived", "two"),
    ]
    assert model.versions[1].time == "2026-03-01T02:00:00.000000+00:00"
    registry.promote(store, "chat", c, run="four")
    assert [v.number for v in registry.read_model(store, "chat").versions] == [1, 2, 3]
    assert [t.run for t in registry.read_model(store, "chat").history] == [
        "one", "two", "three", "four",
    ]  # fmt: skip
    assert registry.rollback(store, "chat").digest == a
    assert registry.rollback(store, "chat").digest == b


def test_older_program_that_still_publishes_is_heard(store: Store) -> None:
    a, b, c = (made(store, text) for text in "abc")
    publish_old(store, a, 1, "one")
    registry.promote(store, "chat", b)
    publish_old(store, c, 2, "old")
    assert registry.champion(store, "chat") == c
    assert states(registry.read_model(store, "chat")) == "ararch"
    assert registry.rollback(store, "chat").digest == b
    assert registry.champion(store, "chat") == b
    assert [t.digest for t in registry.read_model(store, "chat").history] == [a, b, c, b]


def test_record_that_is_none_of_a_model_is_named(store: Store) -> None:
    store.write_record("models/chat/1.json", {"name": "chat"})
    with pytest.raises(ArtifactCorrupt, match=r"models/chat/1\.json"):
        registry.read_model(store, "chat")
    store.write_record("models/new/log/00000001.json", {"digest": "x", "action": "merge"})
    with pytest.raises(ArtifactCorrupt, match="'merge'"):
        registry.read_model(store, "new")


@pytest.mark.parametrize("which", [1, 2])
def test_record_that_cannot_be_read_spoils_its_own_model_only(store: Store, which: int) -> None:
    a, b, c = (made(store, text) for text in "abc")
    registry.promote(store, "chat", a)
    registry.promote(store, "chat", b)
    registry.promote(store, "other", c)
    registry.promote(store, "chat", a)
    store._backend.write(f"models/chat/log/{which:08}.json", b"")
    for call in (registry.read_model, registry.rollback):
        with pytest.raises(ArtifactCorrupt, match=rf"{which:08}.*'chat' is not known.*repair"):
            call(store, "chat")
    with pytest.raises(ArtifactCorrupt, match="repair"):
        registry.promote(store, "chat", b)
    with pytest.raises(ArtifactCorrupt, match="repair"):  # which artifacts it names is not known
        registry.kept_digests(store, 3)
    assert registry.champion(store, "other") == c
    assert registry.read_model(store, "other").champion is not None
    registry.promote(store, "other", b)
    store._backend.write("models/chat/log/00000003.json", b"")
    assert registry.newest_champion(store) == b


def test_newest_champion_does_not_depend_on_the_writers_clocks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Slow:
            return cls(2001, 1, 1, tzinfo=tz)

    a, b, c = (made(store, text) for text in "abc")
    publish_old(store, a, 1, "one")
    registry.promote(store, "other", b)
    monkeypatch.setattr(registry, "datetime", Slow)
    registry.promote(store, "third", c)
    assert registry.newest_champion(store) == c
    registry.add_candidate(store, "other", a)  # no change of a champion
    assert registry.newest_champion(store) == c
    registry.promote(store, "chat", b)
    assert registry.newest_champion(store) == b
    registry.promote(store, "third", a)
    registry.rollback(store, "third")
    assert registry.newest_champion(store) == c


# --------------------------------------------------------------------------- races


def promote_all(url: str, digests: list[str], run: str) -> list[int]:
    store = open_store(url)
    told = [registry.promote(store, "chat", digest, run=run) for digest in digests]
    return [t.number for t in told if t is not None]


def check_chain(store: Store, model: Model) -> None:
    """Each record follows from the ones before it, and the last one names the champion."""
    names = [number_of(path) for path in store.list_records("models/chat/log/")]
    assert names == list(range(1, len(names) + 1))
    assert [v.state for v in model.versions].count("champion") == 1
    champion = None
    for record in log(store):
        assert record is not None
        told = record.get("versions") or [record]
        assert told[0]["digest"] != champion  # nobody promoted what was champion already
        champion = record["champion"]
        assert told[-1]["digest"] == champion
    assert model.champion is not None and champion == model.champion.digest
    assert champion == registry.champion(store, "chat")


def test_promotions_at_one_moment_give_one_champion_and_one_history(store: Store) -> None:
    old = made(store, "old")
    publish_old(store, old, 1, "before")
    sets = [[made(store, f"{writer} {n}") for n in range(3)] for writer in range(4)]
    calls = [(store.url, digests, f"run-{i}") for i, digests in enumerate(sets)]
    numbers = results_of(promote_all, calls)
    model = registry.read_model(store, "chat")
    check_chain(store, model)
    assert sorted(n for own in numbers for n in own) == list(range(2, 14))
    assert {v.digest for v in model.versions} == {old, *(d for own in sets for d in own)}
    for own, digests in zip(numbers, sets, strict=True):  # what each was told is what is there
        assert own == sorted(own)
        assert [next(t for t in model.history if t.number == n).digest for n in own] == digests


def test_same_promotion_at_one_moment_is_written_once(store: Store) -> None:
    digest = made(store, "a")
    numbers = results_of(promote_all, [(store.url, [digest], str(n)) for n in range(4)])
    assert sorted(numbers) == [[], [], [], [1]]
    check_chain(store, registry.read_model(store, "chat"))


def test_two_who_roll_back_at_one_moment_go_back_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in "abc":
        registry.promote(store, "chat", made(store, text))
    both = threading.Barrier(2)
    held = Store.holding

    def together(self: Store, ref: str) -> object:
        both.wait(30)  # both have read that c is the champion
        return held(self, ref)

    monkeypatch.setattr(Store, "holding", together)
    found: list[object] = []

    def back() -> None:
        try:
            found.append(registry.rollback(store, "chat").digest)
        except StoreError as error:
            found.append(error)

    threads = [threading.Thread(target=back) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    errors = [each for each in found if isinstance(each, StoreError)]
    assert len(found) == 2 and len(errors) == 1
    assert "changed during the rollback from version 3: it is version 2" in str(errors)
    model = registry.read_model(store, "chat")
    assert model.champion is not None and model.champion.number == 2


def test_store_that_never_lets_a_writer_in_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ATTEMPTS", 2)
    monkeypatch.setattr(Store, "write_record", lambda *args, **options: False)
    with pytest.raises(StoreError, match="2 times"):
        registry.promote(store, "chat", made(store, "a"))


# --------------------------------------------------------------------------- garbage


def test_collection_keeps_champion_candidates_and_the_last_archived(store: Store) -> None:
    archived = [made(store, f"old {n}") for n in range(5)]
    champion, candidate, given_up = (made(store, text) for text in ("now", "maybe", "no"))
    registry.add_candidate(store, "chat", given_up)
    for digest in (*archived, champion):
        registry.promote(store, "chat", digest)
    registry.add_candidate(store, "chat", candidate)
    kept = registry.kept_digests(store, 3)
    assert kept == {champion, candidate, given_up, *archived[2:]}
    assert registry.kept_digests(store, 0) == {champion, candidate, given_up}
    registry.archive(store, "chat", given_up)  # now the last one
    assert registry.kept_digests(store, 1) == {champion, candidate, given_up}
    store.collect(lambda: registry.kept_digests(store, 1), EVERYTHING)
    assert {a.digest for a in store.list()} == {champion, candidate, given_up}
    assert registry.champion(store, "chat") == champion
    assert len(registry.read_model(store, "chat").versions) == 8  # history stays


def test_promotion_during_a_collection_is_safe_from_it(store: Store) -> None:
    """What is promoted after the collector has looked is waited for, and found to be gone."""
    a, b = made(store, "a"), made(store, "b")
    registry.promote(store, "chat", b)
    results: list[object] = []

    def promote() -> None:
        try:
            results.append(registry.promote(store, "chat", a))
        except ArtifactNotFound as error:
            results.append(error)

    thread = threading.Thread(target=promote)

    def roots() -> set[str]:
        found = registry.kept_digests(store, 3)
        thread.start()
        thread.join(1)
        assert thread.is_alive()  # it waits for the collector
        return found

    store.collect(roots, EVERYTHING)
    thread.join(60)
    assert len(results) == 1 and isinstance(results[0], ArtifactNotFound)
    assert registry.champion(store, "chat") == b
