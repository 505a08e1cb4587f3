"""Whole stages on a pretended GPU."""

import json

import pytest

from tests.gpu.cases import ALGORITHMS, ARCHITECTURES
from tests.gpu.limits import LEARNS, SCORING
from tests.gpu.matrix import CASES, MAIN, PRECISIONS, VARIANTS

pytestmark = pytest.mark.slow

NAMES = [case.name for case in CASES]
FP32 = [case.name for case in CASES if case.precision == "fp32"]
# Fast paths that are off for a reason of the model's or the job's own, on any device.
OFF = (
    "its attention is eager, not sdpa",
    "gradient checkpointing runs layers again",
    "pairs that share a row: ValueError: too many values",  # bloom takes masks of (B,S) alone
)


@pytest.fixture(scope="module")
def results(compute, tmp_path_factory):
    """Name of a case -> what `tests.gpu.stages.attempt` returned."""
    out = tmp_path_factory.mktemp("stages") / "results.json"
    compute("tests.gpu.stages", "--limits", "--out", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_stage_runs_on_a_gpu(results, name):
    result = results[name]
    assert "error" not in result, f"{result['error']}\n{result['traceback'][-4000:]}"
    unexpected = [text for text in result["off"] if not any(reason in text for reason in OFF)]
    assert unexpected == [], "a fast path fails on the GPU"


@pytest.mark.parametrize("name", FP32)
def test_stage_computes_on_a_gpu_what_it_computes_on_the_cpu(results, name):
    result = results[name]
    assert "error" not in result, result["error"]
    assert len(result["gpu"]) == len(result["cpu"]) > 0
    for on_gpu, on_cpu in zip(result["gpu"], result["cpu"], strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize(
    ("what", "most"),
    [
        *((f"{algorithm}, forward pass", 0.0) for algorithm in LEARNS),
        ("rollout, token", 2.0), ("rollout in which replies end, token", 2.0),
        *((f"{name}, row", 0.0) for name in SCORING),
    ],
)  # fmt: skip
def test_the_host_waits_for_the_gpu_no_more_often_than(results, what, most):
    found = results["limits"][what]
    lines = "\n".join(found["lines"])
    assert 0 <= found["waits"] <= most, f"{found['waits']:.2f} times\n{lines}"


def test_every_pair_of_choices_is_tried():
    met = {
        frozenset(pair)
        for case in CASES
        for one in (case.algorithm, case.architecture, case.precision, case.variant or "plain")
        for other in (case.algorithm, case.architecture, case.precision, case.variant or "plain")
        if (pair := {one, other})
    }
    variants = [variant or "plain" for variant in VARIANTS]
    groups = (MAIN, ARCHITECTURES, PRECISIONS, variants)
    missing = [
        (one, other)
        for i, first in enumerate(groups)
        for second in groups[i + 1 :]
        for one in first
        for other in second
        if frozenset((one, other)) not in met
    ]
    assert missing == []
    assert {case.algorithm for case in CASES} == set(ALGORITHMS)
