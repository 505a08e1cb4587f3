"""A store that is away: results wait for it, checkpoints are tried again in the background."""

import threading

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


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_newest_checkpoint_is_sent_when_the_store_is_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    there, tries, stored = threading.Event(), threading.Semaphore(0), []

    def publish(path, step):
        tries.release()
        if not there.is_set():
            raise StoreUnavailable("gone")
        assert path.is_dir()
        stored.append(step)

    uploader = uploads.Uploader(publish)
    first, second, third = (folder(tmp_path, str(step)) for step in (1, 2, 3))
    uploader.put(first, 1)
    for _ in range(3):
        tries.acquire(timeout=60)  # it is tried again
    uploader.put(second, 2)
    uploader.put(third, 3)  # returns at once, though nothing can be sent
    assert uploader.wait(0) is False
    there.set()
    assert uploader.wait(60) is True
    assert stored == [3], "the older ones are worth nothing any more"
    assert [x.exists() for x in (first, second, third)] == [False] * 3
    said = capsys.readouterr().out
    assert said.count("WARNING: checkpoint") == 1, "one warning for one absence"
    assert "checkpoint 3 is stored, after" in said


def test_close_gives_up_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 60.0)

    def publish(path, step):
        raise StoreUnavailable("gone")

    uploader = uploads.Uploader(publish)
    uploader.put(folder(tmp_path, "1"), 1)
    closing = threading.Thread(target=uploader.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    assert not (tmp_path / "1").exists()


def test_a_bug_does_not_end_the_thread(tmp_path, capsys):
    stored = []

    def publish(path, step):
        if step == 1:
            raise ZeroDivisionError
        stored.append(step)

    uploader = uploads.Uploader(publish)
    uploader.put(folder(tmp_path, "1"), 1)
    assert uploader.wait(60)
    uploader.put(folder(tmp_path, "2"), 2)
    assert uploader.wait(60)
    assert stored == [2]
    assert "checkpoint 1 was not stored: ZeroDivisionError()" in capsys.readouterr().out
