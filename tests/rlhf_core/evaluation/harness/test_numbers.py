"""From the harness's results of two models to numbers and their difference, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_core.evaluation.harness.numbers import metrics_of, summary


def result(acc: list[float], perplexity: float) -> dict[str, Any]:
    """What the harness returns for one task with two metrics, and its group."""
    samples = [{"doc_id": i, "filter": "none", "acc": a} for i, a in enumerate(acc)]
    for sample in samples:
        sample["ppl"] = (-3.0, 2)  # not a number: the metric is made of all of them
    row = {
        "alias": "own", "sample_len": len(acc), "acc,none": sum(acc) / len(acc),
        "acc_stderr,none": 0.25, "ppl,none": perplexity, "ppl_stderr,none": "N/A",
    }  # fmt: skip
    return {
        "results": {"own": row, "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "n-samples": {"own": {"original": 9, "effective": len(acc)}},
        "n-shot": {"own": 2},
        "higher_is_better": {"own": {"acc": True, "ppl": False}, "all": {"acc": True}},
        "samples": {"own": samples},
    }


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("rlhf_core.evaluation.harness.numbers.version", lambda name: "9.9")
    base, policy = result([1.0, 0.0, 0.0, 1.0], 8.0), result([1.0, 1.0, 0.0, 0.0], 6.0)
    return {"base": base, "policy": policy}


def test_change_of_a_mean_has_the_error_of_the_paired_differences(found: dict[str, Any]) -> None:
    change = summary(found, {"own": ["own"]})["change"]["own"]
    # differences 0, 1, 0, -1: mean 0, variance 2/3
    assert change["acc,none"] == {"value": 0.0, "stderr": pytest.approx(math.sqrt(2 / 3) / 2)}
    assert change["ppl,none"] == {"value": -2.0, "stderr": None}


def test_numbers_are_kept_with_errors_counts_and_directions(found: dict[str, Any]) -> None:
    made = summary(found, {"own": ["own"]})
    assert made["lm_eval"] == "9.9"
    assert made["models"]["base"]["own"] == {
        "acc,none": {"value": 0.5, "stderr": 0.25},
        "ppl,none": {"value": 8.0, "stderr": None},
    }
    assert made["tasks"]["own"] == {
        "n": 4, "of": 9, "num_fewshot": 2, "higher_is_better": {"acc": True, "ppl": False},
    }  # fmt: skip


def test_group_with_a_number_of_its_own_stands_for_its_tasks(found: dict[str, Any]) -> None:
    assert summary(found, {"all": ["own"]})["shown"] == ["all"]
    assert summary(found, {"tag": ["own"], "own": ["own"]})["shown"] == ["own"]
    change = summary(found, {"all": ["own"]})["change"]["all"]
    assert change == {"acc,none": {"value": 0.0, "stderr": None}}


def test_what_is_not_finite_is_no_number() -> None:
    row = {"alias": "x", "ppl,none": math.inf, "ppl_stderr,none": math.nan, "f1,none": "N/A"}
    assert metrics_of(row) == {"ppl,none": {"value": None, "stderr": None}}
