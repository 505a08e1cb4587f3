"""Who becomes champion, by evaluations of real runs' form."""

import json
from pathlib import Path

import pytest

from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import registry
from tasks.promotion import WINS, Promotion, against_champion, promotion_of, refusal
from tasks.publish import make_artifact
from tasks.reporting.verdict import Verdict
from tasks.run import Run, StageResult

NUMBERS = json.loads((Path(__file__).parent / "stubs/rlhf_stub/evaluation.json").read_text())
REWARD = NUMBERS["differences"]["reward"]  # rose


def with_gold(mean, low, high):
    """The reward rose, and the gold score changed by this much."""
    return {"differences": {"reward": REWARD, "gold": {"mean": mean, "low": low, "high": high}}}


WORSE = with_gold(-0.3, -0.4, -0.2)  # by the judge, and the reward rose: hacked
WITHOUT_REWARD = {
    "differences": {"gold": WORSE["differences"]["gold"]},
    "models": {
        name: {key: value for key, value in row.items() if not key.startswith("reward")}
        for name, row in NUMBERS["models"].items()
    },
}


@pytest.fixture
def run(tmp_path, monkeypatch, store):
    """A run on pairs of its own, so that the judge had no part in the training."""
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    return Run(build_config("smoke", ["data.preference={source: pairs.jsonl}"]), "run-1", store)


def add(run, stage, kind, files):
    artifact = run.store.publish_derived(kind=kind, files=files, parents=(), metadata={})
    run.stages[stage] = StageResult(
        stage=stage, digest=artifact.digest, kind=kind, key="", reused=False, seconds=1
    )
    return artifact.digest


def trained(run, weights=b"w", compared=None, **numbers):
    """A policy with an evaluation, and one against the champion."""
    files = {"config.json": b"{}", "model.safetensors": weights}
    run.artifacts_by_role["model"] = add(run, "ppo", "model", files)
    text = json.dumps({**NUMBERS, **numbers}).encode()
    evaluation = add(run, "evaluate", "evaluation", {"evaluation.json": text})
    if compared is not None:
        text = json.dumps({**NUMBERS, **compared}).encode()
        add(run, "compare", "evaluation", {"evaluation.json": text})
    return run.artifacts_by_role["model"], evaluation


def crown(run, *made):
    registry.promote(run.store, "smoke", make_artifact(run, "smoke", *made).digest)


def test_first_model_is_champion_without_proof_of_a_gain(run):
    trained(run)
    run.config = build_config("smoke")  # its judge labelled the pairs: not shown
    assert promotion_of(run) == Promotion(True, "the first champion")
    trained(run, models={}, win_rate={})
    assert promotion_of(run).promoted, "nothing was measured, and no gate asked for more"


@pytest.mark.parametrize(
    ("numbers", "state"),
    [(WORSE, "reward hacked"), ({**WORSE, **WITHOUT_REWARD}, "worse")],
)
def test_first_model_is_no_champion_when_it_is_worse_or_hacked(run, numbers, state):
    trained(run, **numbers)
    found = promotion_of(run)
    assert not found.promoted and found.reason == refusal(run)
    assert found.reason.startswith(f'the verdict is "{state}". PPO over SFT: ')
    run.config = build_config("smoke", ["publish.promote=always"])
    assert promotion_of(run).promoted
    run.config = build_config("smoke")
    run.decision = {"decision": "approve", "reason": "as I want it"}
    assert promotion_of(run) == Promotion(True, "as I want it")


def test_later_model_has_to_win_the_comparison(run):
    crown(run, *trained(run))
    assert promotion_of(run) == Promotion(True, "the champion's weights")
    trained(run, b"other")
    assert "was not compared" in promotion_of(run).reason and not promotion_of(run).promoted
    trained(run, b"other", compared={})
    assert promotion_of(run) == Promotion(True, "against the champion: better")
    trained(run, b"other", compared=WORSE)
    assert promotion_of(run).reason.startswith('the verdict against the champion is "reward hac')


def test_bound_of_the_user_is_enough_but_not_for_a_worse_model(run):
    crown(run, *trained(run))
    run.config = build_config("smoke", ["evaluate.min_win_rate=0.5"])
    trained(run, b"other")
    assert not promotion_of(run).promoted, "that bound was kept against the SFT model"
    same = with_gold(0.01, -0.1, 0.1)
    trained(run, b"other", compared=same)
    assert "is 0.74, at least 0.5 (evaluate.min_win_rate)" in promotion_of(run).reason
    assert promotion_of(run).promoted
    trained(run, b"other", compared={**same, "win_rate": {"gold": {"rate": 0.49, "n": 128}}})
    assert not promotion_of(run).promoted, "it was kept against the SFT model only"
    trained(run, b"other", compared=WORSE)
    assert not promotion_of(run).promoted


@pytest.mark.parametrize(
    ("state", "bound", "promoted"),
    [("better", None, True), ("better at a price", None, True), ("not shown", None, False),
     ("not shown", 0.0, True)],
)  # fmt: skip
def test_only_a_shown_gain_or_a_bound_takes_the_champions_place(state, bound, promoted):
    assert against_champion(Verdict(state, "numbers"), bound, 0.5).promoted == promoted
    assert not against_champion(Verdict(state, "numbers"), 0.51, 0.5).promoted or state in WINS
    assert not against_champion(None, bound, None).promoted
