"""The order of syncs and names: what `test_power_cut` shows on a disk, here for each file."""

import os
from pathlib import Path

import pytest

from rlhf_core.store import open_store, registry
from rlhf_core.system.durable import write_whole


class Disk:
    """Watches what gets a name, and whether its bytes and its folders are on the disk by then.

    Attributes:
        unsynced: files that got a name before their bytes were synced.
        waiting: files whose name is not on the disk yet, by their folder's inode.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsynced: list[str] = []
        self.waiting: dict[int, set[str]] = {}
        self._synced: set[int] = set()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)
        for name in ("link", "replace", "rename"):
            monkeypatch.setattr(os, name, self.named(getattr(os, name)))

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        self._synced.add(inode)
        self.waiting.pop(inode, None)

    def named(self, move):  # type: ignore[no-untyped-def]
        def call(source, target):  # type: ignore[no-untyped-def]
            source, target = Path(source), Path(target)
            if source.is_file() and source.stat().st_ino not in self._synced:
                self.unsynced.append(str(target))
            if target.name == "manifest.json":
                assert not self.waiting, f"{target} appears before the names of its files are safe"
            move(source, target)
            self.waiting.setdefault(target.parent.stat().st_ino, set()).add(str(target))

        return call


def test_nothing_gets_a_name_before_its_bytes_are_on_the_disk(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    store = open_store(str(tmp_path / "store"))
    disk = Disk(monkeypatch)
    artifact = store.publish(folder, kind="model")
    assert disk.waiting == {}
    store.commit_stage("key", artifact)
    registry.promote(store, "name", artifact.digest)
    store.write_record("runs/one.json", {})
    assert disk.waiting == {}
    store.fetch(artifact.ref)
    store.fetch(artifact.ref, tmp_path / "pulled")
    write_whole(tmp_path / "file", b"bytes")
    assert disk.waiting == {} and disk.unsynced == []
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_new_folders_are_on_the_disk_up_to_the_store_and_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    synced: set[Path] = set()
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    store.scoped("checkpoints/key").write_record("lowered/0.json", {})
    root = tmp_path / "store"
    below = (root, root / "checkpoints", root / "checkpoints/key", root / "checkpoints/key/lowered")
    assert {tmp_path, *below} <= synced
