"""Which models stay in memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_core.errors import ModelError, OutOfMemory
from rlhf_core.playground.pool import ModelPool, weight_bytes


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with weights of so many bytes."""

    def make(size):
        path = tmp_path / str(size)
        path.mkdir(exist_ok=True)
        save_file({"w": np.zeros(size, np.uint8)}, path / "model.safetensors")
        return path

    return make


class Loads(list):
    def __call__(self, folder):
        self.append(folder.name)
        return object()


def use(pool, digest, folder, loads):
    with pool.use(digest, folder, loads) as model:
        return model


def test_model_is_loaded_once(folder):
    pool, loads = ModelPool(100), Loads()
    assert use(pool, "a", folder(40), loads) is use(pool, "a", folder(40), loads)
    assert loads == ["40"]


def test_least_recently_used_leaves(folder):
    pool, loads = ModelPool(100), Loads()
    for digest, size in (("a", 40), ("b", 41), ("a", 40), ("c", 42)):
        use(pool, digest, folder(size), loads)
    assert pool.loaded() == ["a", "c"]
    use(pool, "b", folder(41), loads)
    assert pool.loaded() == ["c", "b"]
    assert loads == ["40", "41", "42", "41"]


def test_model_in_use_stays_and_the_next_waits_for_it(folder):
    pool, loads, done = ModelPool(100), Loads(), threading.Event()

    def second():
        use(pool, "b", folder(70), loads)
        done.set()

    first, other = folder(60), folder(70)
    with pool.use("a", first, loads):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert not done.wait(0.3)
        assert pool.loaded() == ["a"]
    assert done.wait(60)
    assert pool.loaded() == ["b"] and other.exists()


def test_two_users_share_one_load(folder):
    pool, index, begun = ModelPool(100), folder(60), threading.Event()
    found, loads = [], []

    def slow(path):
        loads.append(path)
        begun.set()
        threading.Event().wait(0.2)
        return object()

    threads = [
        threading.Thread(target=lambda: found.append(use(pool, "a", index, slow))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(loads) == 1 and found[0] is found[1]


def test_larger_than_the_limit_is_told_with_both_numbers(folder):
    with pytest.raises(OutOfMemory, match=r"needs 2 MiB, but the page may use 1 MiB.*--memory-gb"):
        use(ModelPool(2**20), "a", folder(2**21), Loads())


def test_damaged_model_is_an_error_and_the_next_try_may_work(folder):
    pool, index = ModelPool(100), folder(50)

    def broken(path):
        raise ModelError("broken")

    with pytest.raises(ModelError, match="broken"):
        use(pool, "a", index, broken)
    assert pool.loaded() == []
    use(pool, "a", index, Loads())
    assert pool.loaded() == ["a"]
    file = index / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        weight_bytes(index)
