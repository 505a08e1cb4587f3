"""Online DPO on real ranks: it learns what the judge prefers, the same on any ranks."""

import numpy as np
import pytest
from safetensors.torch import load_file

from rlhf_core.jobs import LoRA, Resources
from rlhf_core.jobs.online_dpo import OnlineDPOJob
from tests.rlhf_core.rewards.standin import StandIn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make(models, data):
    def made(strategy="ddp", **settings):
        place = {"micro_batch_size": 4, "threads": 1, "strategy": strategy, "device": "cpu",
                 "checkpoint_every": 1000}  # fmt: skip
        values = {
            "model": models["llama"], "prompts": data["prompts"], "steps": 3, "max_new_tokens": 6,
            "rewards": [{"type": "length", "target": 1, "width": 4}], "min_length": None,
            "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32", "beta": 0.1,
            "missing_eos_penalty": 0.0, "schedule": "constant", "warmup_fraction": 0.0,
            "resources": Resources(**place),
        }  # fmt: skip
        return OnlineDPOJob(**(values | settings))

    return made


@pytest.fixture(scope="module")
def learned(run_plan, make, random_reward):
    """Against a reward model with a random head: it never scores two alike."""
    settings = {"steps": 24, "batch_size": 32, "learning_rate": 2e-2,
                "rewards": [{"type": "model"}], "reward_model": random_reward}  # fmt: skip
    return run_plan(1, {loss: (make(**settings, loss=loss), {}) for loss in ("sigmoid", "ipo")})


@pytest.fixture(scope="module")
def judges():
    """Behind /fair the shorter reply wins; /place goes by position; /down is gone once, when it is
    asked for the 20th time."""
    asked = []

    def answer(path, body):
        asked.append(path)
        if path.startswith("/down") and asked.count(path) == 20:
            return 503, "gone", {}
        first, second, _ = body["messages"][0]["content"].split("<cut>")
        fair = "[[C]]" if len(first) == len(second) else f"[[{'BA'[len(first) < len(second)]}]]"
        text = "[[A]]" if path.startswith("/place") else fair
        return {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 5}}

    server = StandIn(answer)

    def settings(which):
        judge = {"url": f"{server.url}/{which}/v1", "model": "m", "retries": 0, "parallel": 1,
                 "template": "{first}<cut>{second}<cut>{prompt} [[A]] [[B]]"}  # fmt: skip
        return {"rewards": [], "judge": judge}

    settings.asked = asked
    yield settings
    server.close()


@pytest.fixture(scope="module")
def one(run_plan, make, judges):
    often = {"micro_batch_size": 4, "threads": 1, "device": "cpu", "checkpoint_every": 1}
    down = make(**judges("down"), resources=Resources(**often))
    plan = {
        "fair": (make(**judges("fair")), {}),
        "place": (make(**judges("place")), {}),
        "down": (down, {"where": "judge"}),
        "again": (down, {"where": "judge"}),
        "plain": (make(), {}),
        "lora": (make(lora=LoRA(rank=2, alpha=8)), {}),
        "half": (make(), {"where": "cut", "stop_after": 2}),
        "rest": (make(), {"where": "cut"}),
    }
    return run_plan(1, plan)


@pytest.fixture(scope="module")
def two(run_plan, make, judges):
    plan = {kind: (make(kind), {}) for kind in ("ddp", "zero2", "fsdp2")}
    return run_plan(2, plan | {"fair": (make(**judges("fair")), {})})


@pytest.mark.long
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_policy_learns_what_the_judge_prefers(learned, loss):
    lines = learned[loss].metrics
    scores, margins = ([line[key] for line in lines] for key in ("score", "margin"))
    gain = np.mean(scores[-8:]) - np.mean(scores[:4])
    assert gain > 0.15, f"{gain:.3f} {np.round(scores, 2).tolist()}"
    assert np.mean(margins[-8:]) > 0.02, margins


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_policy_starts_at_the_reference_and_leaves_it(one, name):
    margins = [line["margin"] for line in one[name].metrics]
    assert margins[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(margins[-1]) > 1e-6


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2", "fair"])
def test_two_ranks_compute_what_one_does(one, two, kind):
    alone = one.get(kind, one["plain"])
    for line, other in zip(two[kind].metrics, alone.metrics, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if name != "accuracy":  # of margins near 0 rounding decides
                np.testing.assert_allclose(line[name], value, 1e-4, 1e-4, err_msg=name)
    others = alone.weights()
    for name, value in two[kind].weights().items():
        np.testing.assert_allclose(value, others[name], atol=2e-5, err_msg=name)


def test_resumed_run_ends_in_the_same_artifact(one):
    assert "the checkpoint after step 2" in one["half"].said
    assert one["rest"].artifact.digest == one["plain"].artifact.digest


def test_judge_of_pairs_is_trained_on(one):
    for line in one["fair"].metrics:
        counts = {name: line[f"judge_{name}"] for name in ("agreed", "by_position", "identical")}
        assert counts["by_position"] == line["judge_unclear"] == 0
        assert line["ties"] == (counts["agreed"] + counts["identical"]) / 8 < 1
        assert line["judge_requests"] == 2 * (8 - counts["identical"])
        assert line["judge_tokens_per_pair"] == 5 * line["judge_requests"] / 8
        assert "loss" in line and not {"score", "reward"} & line.keys()
    assert abs(one["fair"].metrics[-1]["margin"]) > 1e-6


def test_judge_that_contradicts_itself_teaches_nothing(one, stages, models):
    for line in one["place"].metrics:
        assert line["ties"] == 1.0 and "loss" not in line
        assert line["judge_by_position"] + line["judge_identical"] == 8
    folder = one["place"].store.fetch(models["llama"])
    start = {}
    for path in sorted(folder.glob("*.safetensors")):
        start |= load_file(path)
    found = one["place"].weights()
    assert found.keys() <= start.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, start[name].float(), err_msg=name)


def test_judge_that_is_down_ends_the_stage_and_the_next_start_goes_on(one, judges):
    assert "/down/v1 failed 1 times: HTTP 503: gone" in one["down"].said
    assert not (one["again"].folder / "said.txt").exists()
    for name, value in one["again"].weights().items():
        np.testing.assert_array_equal(value, one["fair"].weights()[name], err_msg=name)
    first, *later = [int(line["judge_requests"]) for line in one["fair"].metrics]
    assert first < 20, "the second rollout ended it"
    asked = judges.asked.count("/down/v1/chat/completions")
    assert asked == 20 + sum(later), "about the first rollout it was asked once"
