"""Rollouts in processes of their own, as real jobs on real ranks.

Each sampler imports torch anew, which takes seconds: `make chaos` has the variants.
"""

import re

import numpy as np
import psutil
import pytest

from rlhf_core.jobs import BuiltinRollout, LoRA
from tests.rlhf_core.algorithms.stages import weight_hashes
from tests.rlhf_core.algorithms.test_online import column, make

__all__ = ["make"]

pytestmark = pytest.mark.slow


def separate(**settings):
    return BuiltinRollout(placement="separate", **settings)


def learning(make, **settings):
    return make(
        "grpo", steps=12, batch_size=8, learning_rate=1e-2, epochs=2, kl_coef=0.0,
        missing_eos_penalty=0.0, place={"micro_batch_size": 16}, **settings,
    )  # fmt: skip


def carried_job(make):
    rollout = separate(max_staleness=2, segments=2)
    return make("grpo", steps=6, rollout=rollout, place={"checkpoint_every": 3})


@pytest.fixture(scope="module")
def one_rank(run_plan, make):
    """In one process; samplers are started for each stage."""
    evaluated = {"eval_every": 2, "eval_prompts": 5}
    carried = carried_job(make)
    return run_plan(1, {
        "together": (make("grpo", **evaluated), {}),
        "apart": (make("grpo", rollout=separate(), **evaluated), {}),
        "carried": (carried, {}),
        "carried-killed": (carried, {"where": "carried-died", "kill_after": 3}),
        "carried-again": (carried, {"where": "carried-died"}),
    })  # fmt: skip


@pytest.fixture(scope="module")
def stopped(run_plan, make):
    """The carried stage, stopped after two steps, and gone on with."""
    carried = carried_job(make)
    return run_plan(1, {
        "half": (carried, {"where": "carried-cut", "stop_after": 2}),
        "rest": (carried, {"where": "carried-cut"}),
    })  # fmt: skip


@pytest.fixture(scope="module")
def learned(run_plan, make):
    return run_plan(1, {"learns": (learning(make, rollout=separate(max_staleness=1)), {})})[
        "learns"
    ]


@pytest.fixture(scope="module")
def variants(run_plan, make):
    """The same of other strategies, on two ranks and two samplers, and of adapters."""
    found, two = {}, {"ranks": 2}
    for kind, precision in (
        ("ddp", "fp32"),
        ("zero2", "bf16"),
        ("fsdp2", "bf16"),
        ("fsdp2", "fp32"),
    ):
        place = {"strategy": kind, "micro_batch_size": 2}
        for name, rollout in (("together", {}), ("apart", {"rollout": separate(**two)})):
            job = make("grpo", precision=precision, place=place, **rollout)
            found[f"{kind}-{precision}-{name}"] = (job, {})
    lora = {"lora": LoRA(rank=2, alpha=8), "learning_rate": 1e-2}
    found["lora-together"] = (make("rloo", **lora), {})
    found["lora-apart"] = (make("rloo", rollout=separate(**two), **lora), {})
    ahead = separate(max_staleness=3, segments=4, **two)
    found["ppo-ahead"] = (make("ppo", steps=6, rollout=ahead), {})
    return run_plan(2, found)


def assert_no_byte_differs(together, apart):
    assert together.job.key() == apart.job.key()
    assert weight_hashes(together.artifact) == weight_hashes(apart.artifact)
    assert together.metrics == apart.metrics


def test_separate_samplers_change_no_byte(one_rank):
    assert_no_byte_differs(one_rank["together"], one_rank["apart"])


@pytest.mark.chaos
@pytest.mark.parametrize("name", ("ddp-fp32", "zero2-bf16", "fsdp2-bf16", "fsdp2-fp32", "lora"))
def test_separate_samplers_change_no_byte_under_any_strategy(variants, name):
    assert_no_byte_differs(variants[f"{name}-together"], variants[f"{name}-apart"])


@pytest.mark.chaos
def test_two_samplers_carry_the_replies_of_two_ranks(variants):
    run = variants["ppo-ahead"]
    assert column(run, "staleness_max") == [0.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert run.artifact is not None


def test_replies_are_as_old_as_the_bound_and_no_older(one_rank):
    carried = one_rank["carried"]
    assert column(carried, "staleness_max") == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    means = column(carried, "staleness")
    assert means[:2] == [0.0, 1.0] and all(1.0 < mean < 2.0 for mean in means[2:])
    assert all(share > 0.5 for share in column(carried, "carried_replies")[2:])


@pytest.mark.long
def test_policy_learns_from_replies_of_the_step_before(learned):
    assert column(learned, "staleness") == [0.0] + [1.0] * 11
    assert column(learned, "carried_replies") == [0.0] * 12
    scores = column(learned, "score")
    # 0.35 as measured; replies of the newest weights gain more in twelve steps
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.2, scores


@pytest.mark.long
def test_older_replies_are_weighted(learned):
    assert column(learned, "rollout_weight_max")[0] == pytest.approx(1.0, abs=1e-3)
    assert min(column(learned, "rollout_weight_max")[1:]) > 1.01


@pytest.mark.long
def test_resumed_stage_trains_on_the_replies_that_it_had_sampled_ahead(one_rank, stopped):
    whole, half, rest = one_rank["carried"], stopped["half"], stopped["rest"]
    assert "the checkpoint after step 2" in half.said
    assert weight_hashes(whole.artifact) == weight_hashes(rest.artifact)
    assert whole.metrics == rest.metrics


def test_stage_whose_sampler_died_says_so_and_goes_on_from_its_checkpoint(one_rank):
    whole, killed, again = (one_rank[f"carried{part}"] for part in ("", "-killed", "-again"))
    assert re.match(r"Sampler 0 \(process \d+\) ended by signal 9; the kernel kills", killed.said)
    assert len(killed.metrics) in (3, 4, 5)
    assert [line["step"] for line in again.metrics] == [1, 2, 3, 4, 5, 6]
    assert weight_hashes(whole.artifact) == weight_hashes(again.artifact)


def test_no_sampler_is_left(one_rank):
    assert one_rank["carried"].artifact is not None
    left = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "rlhf sampler"]
    ours = [p for p in left if psutil.Process() in p.parents()]
    assert not ours
