"""Which category an exception of a rank belongs to, and what on_nonfinite does to a stage's key."""

import errno
import json
import os
import subprocess
import sys

import pytest

from rlhf_core.errors import DataError, RateLowered
from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.runtime.rank import classify, describe, report
from rlhf_core.runtime.stopping import write_error

D = "0" * 64
JOB = SFTJob(model=D, data=D, resources=Resources(collective_timeout=40))


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 8 bytes. Error code 12"), "oom"),
        (MemoryError(), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (RuntimeError("std::bad_alloc"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom"),
        (RuntimeError("[gloo] Timed out waiting 40000ms for recv operation to complete"), "hang"),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4)"), "hang"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4242"), "internal"),
        (KeyError("x"), "internal"),
        (DataError("row 7: out of memory"), "data"),
        (RateLowered("x"), "rate_lowered"),
    ],
)  # fmt: skip
def test_category_of_an_error(error, category):
    assert classify(error) == category


def test_lack_of_memory_is_seen_behind_the_error_of_a_library():
    with pytest.raises(RuntimeError) as raised:
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("could not read the table") from error
    assert classify(raised.value) == "oom"
    with pytest.raises(RuntimeError) as raised:
        try:
            raise MemoryError
        except MemoryError:
            raise RuntimeError("something else") from None
    assert classify(raised.value) == "internal"


def test_memory_error_without_a_text_is_described_with_its_peak():
    first, peak = describe(MemoryError(), "oom", "3", JOB).splitlines()
    assert first == "rank 3 ran out of memory: MemoryError"
    assert peak.startswith("Peak of rank 3: ")
    assert peak.endswith(" in main memory.")


def test_waiting_rank_names_the_setting():
    text = describe(RuntimeError("Timed out waiting"), "hang", "0", JOB)
    assert "rank 0 waited 40 s (resources.collective_timeout)" in text


def test_a_factor_is_part_of_the_key_and_failing_is_not():
    # The key as it was before the setting existed: old results stay valid.
    assert JOB.key() == "d0948efa726b263b5e3cd7941354734e0a6f08614abfc0dc04c751ca59877488"
    careful = JOB.model_copy(update={"on_nonfinite": 0.5})
    assert careful.key() != JOB.key()
    assert careful.fail_fast_variant().key() == JOB.key()


@pytest.mark.parametrize(("size", "prefix"), [("1", ""), ("2", "rank 1: ")])
def test_warnings_of_the_project_reach_the_stages_log(size, prefix):
    code = (
        "import logging; from rlhf_core.runtime.rank import show_own_warnings as show\n"
        "logging.basicConfig(level='CRITICAL'); show(); show()\n"
        "logging.getLogger('rlhf_core.fast_paths').warning('off: %s', 'why')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | {"RANK": "1", "WORLD_SIZE": size},
    )  # fmt: skip
    assert done.stderr == f"{prefix}off: why\n"


@pytest.mark.parametrize(("told", "shown"), [(True, False), (False, True)])
def test_rank_that_lost_one_which_told_a_user_why_adds_no_traceback(
    tmp_path, monkeypatch, capsys, told, shown
):
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    if told:
        write_error(tmp_path, "1", "training", "The environment's step raised KeyError: 'board'.")
    report(lost, tmp_path, "0", JOB)
    assert ("Connection closed by peer" in capsys.readouterr().err) == shown
    own = json.loads((tmp_path / "error-0.json").read_text())
    assert own["category"] == "internal", "the orchestrator knows that it is a consequence"
    (tmp_path / "error-0.json").unlink()
    report(KeyError("x"), tmp_path, "0", JOB)
    assert "KeyError" in capsys.readouterr().err, "a bug of its own is always shown"
