"""Whole online jobs whose replies vLLM samples, on real ranks."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from rlhf_core.jobs import (
    DataJob,
    GRPOJob,
    ImportModelJob,
    LoRA,
    PPOJob,
    ReinforcePPJob,
    Resources,
    RLOOJob,
    VllmRollout,
)
from rlhf_core.models.loading import new_scalar_model
from rlhf_core.models.saving import save_scalar_model
from rlhf_core.runtime.distributed import computes_in_bf16
from tests.rlhf_core.algorithms.conftest import talk
from tests.rlhf_core.algorithms.stages import run_plan_in, weight_hashes
from tests.rlhf_core.algorithms.test_online import column
from tests.rlhf_core.tiny_models import wide_copy

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CLASSES = {"ppo": PPOJob, "grpo": GRPOJob, "rloo": RLOOJob, "reinforce_pp": ReinforcePPJob}


@pytest.fixture(scope="module")
def inputs(stages):
    """role -> digest of a model that vLLM's CPU kernels can run, prompts, and a random reward."""
    folder = wide_copy("llama", stages.folder / "wide", scale=1.0)
    [model] = stages.run(ImportModelJob(source=str(folder)))
    prompts = stages.folder / "wide.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": talk(i)[0]}) + "\n" for i in range(80)))
    [data] = stages.run(DataJob(purpose="prompts", source=str(prompts), model=model.digest))
    reward, source = stages.folder / "wide-reward", stages.store.fetch(model.digest)
    reward.mkdir()
    save_scalar_model(new_scalar_model(source, 0), reward, source)
    return {
        "model": model.digest,
        "prompts": data.digest,
        "reward_model": stages.store.publish(reward, kind="reward_model").digest,
    }


@pytest.fixture(scope="module")
def make(inputs):
    """algorithm, settings -> a job of 16 replies a rollout."""

    def made(algorithm, **settings):
        place = {"micro_batch_size": 4, "checkpoint_every": 1000, "threads": 1}
        gap = settings.pop("max_logprob_gap", 0.1)
        values = {
            **inputs, "steps": 4, "max_new_tokens": 6, "learning_rate": 1e-3, "precision": "fp32",
            "schedule": "constant", "warmup_fraction": 0.0, "batch_size": 16,
            "rollout": VllmRollout(cpu_cache_mib=32, max_logprob_gap=gap),
            "resources": Resources(**(place | settings.pop("place", {}))),
        }  # fmt: skip
        if algorithm in ("grpo", "rloo"):
            values |= {"batch_size": 4, "group_size": 4}
        return CLASSES[algorithm](**(values | settings))

    return made


@pytest.fixture(scope="module")
def run_plan(stages, inputs, tmp_path_factory):
    """ranks, name -> job and what `online_ranks` is to do with it; all in one start."""
    home = tmp_path_factory.mktemp("vllm")

    return partial(run_plan_in, stages, home, set(inputs.values()))


@pytest.fixture(scope="module")
def one_rank(run_plan, make):
    """Several jobs in one process: each starts an engine after the one before has been closed."""
    learns = {
        "steps": 25, "batch_size": 8, "group_size": 8, "learning_rate": 1e-2, "epochs": 2,
        "kl_coef": 0.0, "missing_eos_penalty": 0.0, "place": {"micro_batch_size": 32},
    }  # fmt: skip
    lora = make("rloo", lora=LoRA(rank=2, alpha=8), learning_rate=1e-2)
    stale = make("grpo", learning_rate=1e-2, max_logprob_gap=0.02)
    return run_plan(1, {
        "grpo": (make("grpo"), {}),
        "half": (make("grpo"), {"where": "cut", "stop_after": 2}),
        "rest": (make("grpo"), {"where": "cut"}),
        "learns": (make("grpo", **learns), {}),
        "ppo": (make("ppo", minibatches=2), {}),
        "reinforce_pp": (make("reinforce_pp", precision="bf16"), {}),
        "rloo-lora": (lora, {}),
        "fresh": (stale, {}),
        "stale": (stale, {"stale_after": 1}),
    })  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(run_plan, make):
    return run_plan(2, {
        "grpo": (make("grpo"), {}),
        "zero2": (make("rloo", precision="bf16", place={"strategy": "zero2"}), {}),
    })  # fmt: skip


@pytest.fixture(scope="module")
def apart(run_plan, make):
    """The engine in a process of its own."""
    rollout = VllmRollout(cpu_cache_mib=32, max_logprob_gap=0.1, placement="separate")
    ahead = rollout.model_copy(update={"max_staleness": 1, "segments": 2})
    return run_plan(1, {
        "apart": (make("grpo", rollout=rollout), {}),
        "ahead": (make("grpo", rollout=ahead), {}),
    })  # fmt: skip


@pytest.fixture(scope="module")
def sharded(run_plan, make):
    """Policies that no rank holds whole, on two ranks."""
    rollout = VllmRollout(cpu_cache_mib=32, max_logprob_gap=0.1, placement="separate")
    place = {"place": {"strategy": "fsdp2"}}
    return run_plan(2, {
        "fsdp2": (make("grpo", **place), {}),
        "fsdp2-lora": (make("grpo", lora=LoRA(rank=2, alpha=8), learning_rate=1e-2, **place), {}),
        "fsdp2-bf16": (make("ppo", precision="bf16", minibatches=2, **place), {}),
        "fsdp2-apart": (make("grpo", rollout=rollout, **place), {}),
    })  # fmt: skip


def samples(run):
    lines = (run.folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["samples"] for line in lines]


def test_policy_learns_from_what_the_engine_samples(one_rank):
    scores = column(one_rank["learns"], "score")
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.5, scores


@pytest.mark.parametrize("name", ("grpo", "learns", "ppo", "rloo-lora", "fresh"))
def test_engine_follows_the_policy_through_a_stage(one_rank, name):
    run = one_rank[name]
    assert run.artifact is not None
    assert max(column(run, "rollout_logprob_gap")) < 1e-4
    assert column(run, "kl_k3")[-1] > 1e-4, "the policy has moved"


def test_half_precision_stays_within_the_bound(one_rank, two_ranks):
    runs = (one_rank["reinforce_pp"], two_ranks["zero2"])
    assert all(run.artifact is not None for run in runs)
    ddp, zero2 = (max(column(run, "rollout_logprob_gap")) for run in runs)
    assert 1e-5 < zero2 < 0.05
    if computes_in_bf16(torch.device("cpu")):
        assert 1e-5 < ddp < 0.05
    else:  # ddp takes fp32 there, and so does its engine
        assert ddp < 1e-4


def test_resumed_run_ends_in_the_same_bytes(one_rank):
    whole, half, rest = (one_rank[name] for name in ("grpo", "half", "rest"))
    assert "the checkpoint after step 2" in half.said
    assert weight_hashes(whole.artifact) == weight_hashes(rest.artifact)
    assert samples(half) + samples(rest) == samples(whole)


def test_two_ranks_sample_and_learn_what_one_does(one_rank, two_ranks):
    one, two = one_rank["grpo"], two_ranks["grpo"]
    replies = [[[s["reply"] for s in step] for step in samples(run)] for run in (one, two)]
    assert replies[0] == replies[1]
    for name in ("score", "length", "kl", "entropy", "grad_norm"):
        np.testing.assert_allclose(column(one, name), column(two, name), atol=2e-3, err_msg=name)


def test_engine_in_a_process_of_its_own_samples_the_same(one_rank, apart):
    assert weight_hashes(apart["apart"].artifact) == weight_hashes(one_rank["grpo"].artifact)
    assert samples(apart["apart"]) == samples(one_rank["grpo"])


def test_engine_carries_replies_over_an_update(apart):
    run = apart["ahead"]
    assert run.artifact is not None
    assert max(column(run, "staleness_max")) == 1 and max(column(run, "carried_replies")) > 0


@pytest.mark.parametrize("name", ("fsdp2", "fsdp2-lora", "fsdp2-bf16", "fsdp2-apart"))
def test_engine_gets_the_weights_of_a_policy_that_no_rank_holds_whole(sharded, name):
    run = sharded[name]
    assert run.artifact is not None, run.said
    assert max(column(run, "rollout_logprob_gap")) < (0.05 if name == "fsdp2-bf16" else 1e-4)
    assert column(run, "kl_k3")[-1] > 1e-4, "the policy has moved"


def test_sharded_ranks_sample_and_learn_what_one_does(one_rank, sharded):
    for run in (sharded["fsdp2"], sharded["fsdp2-apart"]):
        replies = [[s["reply"] for s in step] for step in samples(run)]
        assert replies == [[s["reply"] for s in step] for step in samples(one_rank["grpo"])]
        for name in ("score", "length", "kl", "entropy", "grad_norm"):
            expected = column(one_rank["grpo"], name)
            np.testing.assert_allclose(column(run, name), expected, atol=2e-3, err_msg=name)


def test_engine_that_kept_old_weights_ends_the_stage(one_rank):
    run = one_rank["stale"]
    assert len(run.metrics) == 1, "the first rollout was the policy's"
    assert "nats (mean) between vLLM and the trainer" in run.said
    assert "more than grpo.rollout.max_logprob_gap 0.02" in run.said
    assert "sampled from another policy" in run.said
    assert run.artifact is None
