"""The S3 server that is started for one command (`make demo-s3`)."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlhf_core.store.s3.synced import sync_changed

ROOT = Path(__file__).parents[4]

COMMAND = """
import os
from rlhf_core.store import open_store
store = open_store()
store.check()
print(store.write_record("runs/a.json", {}, create=True), os.environ["RLHF_STORE_ENDPOINT"])
raise SystemExit(3)
"""


def beside(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rlhf_core.store.s3.seaweed", str(folder), *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "AWS_PROFILE": "someone"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_command_runs_beside_a_server_whose_data_stay(tmp_path: Path) -> None:
    folder = tmp_path / "s3 of the demo" / ("a long name" * 10)  # too long for a socket's path
    first = beside(folder, sys.executable, "-c", COMMAND)
    assert first.returncode == 3, first.stderr
    assert first.stdout.startswith("True http://127.0.0.1:")
    second = beside(folder, sys.executable, "-c", COMMAND)
    assert second.stdout.startswith("False http://127.0.0.1:")
    keys = folder / "keys.json"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    secret = keys.read_text().split('"')[7]
    assert secret not in first.stdout + first.stderr + (folder / "weed.log").read_text()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    assert left == []


def test_usage_is_shown() -> None:
    done = beside(Path("--help"))
    assert done.returncode == 2 and "FOLDER COMMAND" in done.stdout


def test_files_of_the_server_are_synced_when_they_change_the_index_first(tmp_path, monkeypatch):
    (tmp_path / "filer").mkdir()
    for name in ("filer/000001.log", "1.dat", "1.idx"):
        (tmp_path / name).write_bytes(b"1")
    synced, known, fsync = [], {}, os.fsync

    def watch(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    sync_changed(tmp_path, known)
    assert synced[:3] == ["1.idx", "1.dat", "000001.log"]
    assert sorted(synced[3:]) == sorted(["filer", tmp_path.name])
    assert sync_changed(tmp_path, known) == []
    (tmp_path / "1.dat").write_bytes(b"12")
    assert sync_changed(tmp_path, known) == [tmp_path / "1.dat"]
