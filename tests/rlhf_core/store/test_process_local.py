"""Things that a process makes once, over forks and threads."""

from __future__ import annotations

import os
import threading
import time

import pytest

from rlhf_core.store.process_local import ProcessLocal


def in_child(check):
    """Whether a check holds in a forked process, within ten seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    for _ in range(1000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False


def test_threads_of_a_process_share_what_one_of_them_makes():
    calls = []

    def make():
        time.sleep(0.05)
        calls.append(os.getpid())
        return object()

    local, found = ProcessLocal(make), []
    threads = [threading.Thread(target=lambda: found.append(local.get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len({id(value) for value in found}) == 1


def test_forked_process_makes_its_own():
    local = ProcessLocal(os.getpid)
    assert local.get() == os.getpid()
    assert in_child(lambda: local.get() == os.getpid() != os.getppid())
    assert local.get() == os.getpid()


def test_forked_process_does_not_wait_for_a_thread_of_its_parent():
    began, goes_on = threading.Event(), threading.Event()
    parent = os.getpid()

    def make():
        if os.getpid() == parent:
            began.set()
            goes_on.wait(20)
        return os.getpid()

    local = ProcessLocal(make)
    thread = threading.Thread(target=local.get)
    thread.start()
    began.wait()
    try:
        assert in_child(lambda: local.get() == os.getpid())
    finally:
        goes_on.set()
        thread.join()


def test_failure_is_raised_and_the_next_call_tries_again():
    answers = iter([ValueError("no"), "made"])

    def make():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    local = ProcessLocal(make)
    with pytest.raises(ValueError, match="no"):
        local.get()
    assert local.get() == local.get() == "made"
