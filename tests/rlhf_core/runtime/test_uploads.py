"""A store that is away: results wait for it, checkpoints are tried again in the background."""

import threading
import time

import pytest

from rlhf_core.errors import StoreError, StoreUnavailable
from rlhf_core.jobs import Resources
from rlhf_core.runtime import uploads


class Clock:
    """Time that passes only in sleep."""

    def __init__(self, monkeypatch):
        self.now, self.sleeps = 0.0, []
        monkeypatch.setattr(uploads.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(uploads.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds


def away_until(clock, when, answer="stored"):
    def call():
        if clock.now < when:
            raise StoreUnavailable("http://x cannot be reached")
        return answer

    return call


def test_result_outlasts_ten_minutes_without_a_store(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    patience = Resources().store_timeout
    assert (
        uploads.retry_while_unavailable(away_until(clock, 600), "the result", patience) == "stored"
    )
    assert clock.now < 630
    assert clock.sleeps == [1, 2, 4, 8, 16] + [30] * 19  # 31 s, then the longest pause
    assert "the result waits for the store, at most 900 s more" in capsys.readouterr().out


def test_patience_ends(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(StoreUnavailable):
        uploads.retry_while_unavailable(away_until(clock, 1e9), "the result", 100)
    assert clock.now == 100


def test_what_waiting_cannot_mend_is_raised_at_once(monkeypatch):
    clock = Clock(monkeypatch)

    def full():
        raise StoreError("no space left")

    with pytest.raises(StoreError):
        uploads.retry_while_unavailable(full, "the result", 100)
    assert clock.now == 0


class Ranks:
    """Uploaders of some ranks that gather from each other."""

    def __init__(self, size):
        self.barrier, self.values = threading.Barrier(size), [None] * size
        self.uploaders = [
            uploads.Uploader(lambda value, rank=rank: self.gather(rank, value), rank == 0)
            for rank in range(size)
        ]

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait(60)
        found = list(self.values)
        self.barrier.wait(60)
        return found

    def put(self, tmp_path, step, sends, commit):
        """One `send` for each rank; returns the ranks' folders."""
        folders = [tmp_path / f"{step}-{rank}" for rank in range(len(sends))]
        for folder, send, uploader in zip(folders, sends, self.uploaders, strict=True):
            folder.mkdir()
            uploader.put(uploads.Upload(step, folder, send, commit))
        return folders


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_checkpoint_is_committed_once_when_all_ranks_have_sent_their_files(tmp_path, capsys):
    ranks, committed, there = Ranks(2), [], threading.Event()

    def late():
        assert there.wait(60)
        return "b"

    folders = ranks.put(tmp_path, 4, [lambda: "a", late], committed.append)
    assert ranks.uploaders[0].wait(0.2) is False and committed == []
    there.set()
    assert all(uploader.wait(60) for uploader in ranks.uploaders)
    assert committed == [["a", "b"]]
    assert not any(folder.exists() for folder in folders)
    assert capsys.readouterr().out == ""


def test_all_ranks_try_again_until_the_store_is_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    ranks, committed, there, tries = Ranks(2), [], threading.Event(), [0, 0]

    def send(rank):
        tries[rank] += 1
        if rank == 1 and not there.is_set():
            raise StoreUnavailable("gone")
        return rank

    folders = ranks.put(tmp_path, 1, [lambda: send(0), lambda: send(1)], committed.append)
    until(lambda: tries[1] > 3)
    assert [uploader.busy for uploader in ranks.uploaders] == [True, True]
    assert committed == [] and all(folder.exists() for folder in folders)
    there.set()
    assert all(uploader.wait(60) for uploader in ranks.uploaders)
    assert committed == [[0, 1]] and tries[0] == tries[1]
    said = capsys.readouterr().out
    assert said.count("WARNING: checkpoint 1 is not stored yet: gone.") == 1, "one for one absence"
    assert "checkpoint 1 is stored, after" in said


def test_newer_checkpoint_takes_the_place_of_one_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    there, stored, tries = threading.Event(), [], []

    def commit(step):
        tries.append(step)
        if not there.is_set():
            raise StoreUnavailable("gone")
        stored.append(step)

    ranks = Ranks(2)
    sends = [lambda: None] * 2
    [first, _] = ranks.put(tmp_path, 1, sends, lambda _: commit(1))
    until(lambda: all(uploader.ready for uploader in ranks.uploaders))
    ranks.put(tmp_path, 2, sends, lambda _: commit(2))
    until(lambda: 2 in tries)
    assert not first.exists(), "not before all ranks have a newer one"
    there.set()
    assert all(uploader.wait(60) for uploader in ranks.uploaders)
    assert stored == [2] and tries == sorted(tries)
    said = capsys.readouterr().out
    assert said.count("WARNING: checkpoint") == 1
    assert "checkpoint 2 is stored, after" in said


def test_failing_checkpoint_stays_until_every_rank_has_a_newer_one(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    there, stored, tries = threading.Event(), [], []

    def commit(step):
        tries.append(step)
        if not there.is_set():
            raise StoreUnavailable("gone")
        stored.append(step)

    ranks = Ranks(2)
    sends = [lambda: None] * 2
    ranks.put(tmp_path, 1, sends, lambda _: commit(1))
    until(lambda: all(uploader.ready for uploader in ranks.uploaders))
    newer = [uploads.Upload(2, tmp_path / "2", lambda: None, lambda _: commit(2))] * 2
    ranks.uploaders[0].put(newer[0])
    assert not ranks.uploaders[0].ready
    count = len(tries)
    until(lambda: len(tries) > count + 2)
    there.set()
    until(lambda: stored == [1])
    assert ranks.uploaders[1].wait(60)
    ranks.uploaders[1].put(newer[1])
    assert all(uploader.wait(60) for uploader in ranks.uploaders)
    assert stored == [1, 2]


def test_close_of_the_first_rank_gives_up_what_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 60.0)

    def send():
        raise StoreUnavailable("gone")

    ranks = Ranks(1)
    [folder] = ranks.put(tmp_path, 1, [send], None)
    closing = threading.Thread(target=ranks.uploaders[0].close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    assert not folder.exists()


def test_a_bug_on_one_rank_gives_up_that_checkpoint_alone(tmp_path, capsys):
    def fail():
        raise ZeroDivisionError

    ranks, committed = Ranks(2), []
    for step, second in ((1, fail), (2, lambda: "b")):
        ranks.put(tmp_path, step, [lambda: "a", second], committed.append)
        assert all(uploader.wait(60) for uploader in ranks.uploaders)
    assert committed == [["a", "b"]]
    assert "checkpoint 1 was not stored: ZeroDivisionError()" in capsys.readouterr().out


def test_end_of_another_rank_ends_the_upload(tmp_path, capsys):
    def broken(value):
        raise RuntimeError("connection closed by peer")

    uploader = uploads.Uploader(broken, first=True)
    (tmp_path / "1").mkdir()
    uploader.put(uploads.Upload(1, tmp_path / "1", lambda: None, lambda sent: None))
    assert uploader.wait(60) and not (tmp_path / "1").exists()
    assert "checkpoint 1 was not stored" in capsys.readouterr().out
