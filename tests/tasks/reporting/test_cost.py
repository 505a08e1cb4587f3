"""Work, waiting, GPU-hours and cost of stages, by hand."""

import pytest

from tasks.reporting.cost import Cost, cells, cost
from tasks.run import StageResult


def stage(seconds, work=None, reused=False):
    return StageResult(
        stage="sft", digest="d", kind="model", key="", reused=reused, seconds=seconds,
        work=work or {},
    )  # fmt: skip


def test_price_is_that_of_the_gpu_hours_of_stages_that_were_made():
    made = stage(207.0, {"seconds": 64.0, "gpus": 8})
    published = stage(3.0)  # by the orchestrator: no ranks
    reused = stage(0.1, {"seconds": 1e6, "gpus": 8}, reused=True)
    found = cost([made, published, reused], 36.0)
    assert found == Cost(67.0, 143.0, pytest.approx(512 / 3600), pytest.approx(5.12))
    assert cells(found) == ["67 s", "2 min 23 s", "0.142", "5.12"]


def test_no_gpu_and_no_price_leave_their_columns_empty():
    assert cells(cost([stage(5.0, {"seconds": 5.0, "gpus": 0})], None)) == ["5.0 s", "", "", ""]
