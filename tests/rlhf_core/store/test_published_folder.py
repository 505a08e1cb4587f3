"""Published folders, for readers that do not wait for anybody."""

import time
from pathlib import Path

import pytest

from rlhf_core.store import Artifact, Store, open_store, published_folder
from rlhf_core.store.published_folder import materialise
from tests.rlhf_core.store.helpers import FORK, contents

SWITCHES = 12


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def versions(store: Store) -> list[Artifact]:
    return [
        store.publish_derived(kind="published", files={f"{n}": text * 1000 for n in range(20)})
        for text in (b"a", b"b", b"c")
    ]


def read_all_the_time(folder: Path, end: object, done: object, wrong: object) -> None:
    """Count the reads, and note those that found nothing or a mix of versions."""
    while not end.is_set():  # type: ignore[attr-defined]
        try:
            (folder / "7").read_bytes()
            found = set(contents(folder.resolve()).values())
        except FileNotFoundError as error:
            wrong.put(f"nothing: {error}")  # type: ignore[attr-defined]
        else:
            if len(found) != 1:
                wrong.put(f"a mix: {sorted(data[:1] for data in found)}")  # type: ignore[attr-defined]
        done.value += 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("was", ["new", "a folder"])
def test_readers_see_one_version_while_the_folder_is_switched(
    store: Store, versions: list[Artifact], tmp_path: Path, was: str
) -> None:
    folder = tmp_path / "published" / "chat"
    if was == "a folder":  # as earlier versions of the program left it
        store.fetch(versions[0].digest, folder)
    else:
        materialise(store, versions[0], folder)
    end, done, wrong = FORK.Event(), FORK.Value("L", 0, lock=False), FORK.Queue()
    reader = FORK.Process(target=read_all_the_time, args=(folder, end, done, wrong), daemon=True)
    reader.start()
    for switch in range(1, SWITCHES + 1):
        materialise(store, versions[switch % 3], folder)
        # Whoever began to read the version before has ended: it goes with the next switch.
        enough, patience = done.value + 3, time.monotonic() + 60
        while done.value < enough and time.monotonic() < patience:
            time.sleep(0.001)
    end.set()
    found = [wrong.get() for _ in range(wrong.qsize())]
    reader.join(30)
    # A plain folder has no link to resolve: the read during its exchange may see both, for once.
    mixes = [text for text in found if text.startswith("a mix")]
    assert len(found) == len(mixes) <= (was == "a folder") and done.value >= 3 * SWITCHES
    assert (folder / "0").read_bytes()[:1] == b"abc"[SWITCHES % 3 :][:1]
    assert len(list((folder.parent / ".chat").iterdir())) == 2  # the newest and the one before


def test_earlier_version_with_a_file_of_somebody_else_is_fetched_anew(
    store: Store, versions: list[Artifact], tmp_path: Path
) -> None:
    folder = tmp_path / "chat"
    materialise(store, versions[0], folder)
    (folder / "notes").touch()
    assert materialise(store, versions[0], folder) == folder and (folder / "notes").exists()
    materialise(store, versions[1], folder)
    materialise(store, versions[0], folder)
    assert contents(folder.resolve()) == {f"{n}": b"a" * 1000 for n in range(20)}


def test_folder_is_replaced_where_links_are_not_possible(
    store: Store, versions: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = tmp_path / "chat"
    for exchange in (published_folder._exchange, lambda *names: False):
        monkeypatch.setattr(published_folder, "_exchange", exchange)
        for number in (0, 1, 2):
            materialise(store, versions[number], folder)
            assert contents(folder) == {f"{n}": b"abc"[number:][:1] * 1000 for n in range(20)}
        assert not folder.is_symlink()
