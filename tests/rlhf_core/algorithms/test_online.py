"""GRPO, RLOO, REINFORCE++ and what they share with PPO, as real jobs on real ranks."""

import itertools
import time
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_core.jobs import (
    GRPOJob,
    LoRA,
    PPOJob,
    ReinforcePPJob,
    Resources,
    RLOOJob,
)
from rlhf_core.runtime import candidates
from rlhf_core.training.stored_checkpoints import open_saved
from tests.rlhf_core.rewards.standin import StandIn

pytestmark = pytest.mark.slow

NEW = ("grpo", "rloo", "reinforce_pp")
CLASSES = {"ppo": PPOJob, "grpo": GRPOJob, "rloo": RLOOJob, "reinforce_pp": ReinforcePPJob}
OBJECTIVES = {
    "dapo": ("grpo", {"clip_range_high": 0.28, "average": "token-mean"}),
    "dr-grpo": ("grpo", {"scale_rewards": False, "average": "seq-mean-token-sum-norm"}),
    "gspo": ("grpo", {"objective": "gspo", "clip_range": 0.03, "clip_range_high": 0.04}),
    "cispo": ("grpo", {"objective": "cispo", "clip_range_high": 0.3, "average": "token-mean"}),
    "dppo": ("grpo", {"objective": "dppo", "clip_range": 0.05}),
    "dual-clip": ("ppo", {"dual_clip": 1.5}),
}
HELD = {  # ways in which the KL holds the policy back
    "grpo-in-loss": {},
    "grpo-in-reward": {"kl_in": "reward"},
    "grpo-corrected": {"kl_correction": True},
    "rloo-in-loss": {"kl_in": "loss", "kl_estimator": "k2"},
    "reinforce_pp-in-loss": {"kl_in": "loss"},
}
SHARED = ("score", "length", "kl", "entropy", "repetition", "policy_loss", "grad_norm")


@pytest.fixture(scope="module")
def make(models, data, random_reward):
    """algorithm, settings -> a job of 16 replies a rollout."""

    def made(algorithm, **settings):
        place = {"micro_batch_size": 4, "checkpoint_every": 1000, "threads": 1}
        values = {
            "model": models["llama"], "reward_model": random_reward, "prompts": data["prompts"],
            "steps": 3, "max_new_tokens": 6, "learning_rate": 1e-3, "precision": "fp32",
            "schedule": "constant", "warmup_fraction": 0.0, "batch_size": 16,
            "resources": Resources(**(place | settings.pop("place", {}))),
        }  # fmt: skip
        if algorithm in ("grpo", "rloo"):
            values |= {"batch_size": 4, "group_size": 4}
        return CLASSES[algorithm](**(values | settings))

    return made


def mixing(make, data, name, **settings):
    return make(name, ptx=data["sft"], ptx_coef=5.0, steps=6, learning_rate=3e-3, **settings)


def collapsing(make, name, strategy="ddp", **settings):
    place = {"checkpoint_every": 1, "keep_checkpoints": 20, "strategy": strategy}
    return make(name, **{"steps": 15, "collapse_window": 2, "place": place} | settings)


def shaped(make, rewards, **place):
    """Two reward models, whose scores are clipped and whitened; all models share lower layers."""
    return make("rloo", ensemble=rewards[1:], combine="mean_minus_std", score_clip=0.5,
                score_whiten=True, trainable_layers=1, place=place)  # fmt: skip


def evaluated(make, strategy="ddp"):
    """A stage that looks for its best evaluation, on a number of prompts that two does not divide,
    by a rule that it is not trained on."""
    rewards = [{"type": "model"}, {"type": "length", "target": 3, "width": 1, "weight": 0.0}]
    return make(
        "grpo", steps=4, eval_every=1, eval_prompts=5, rewards=rewards, select_by="length",
        kl_budget=1.0, learning_rate=3e-3, score_whiten=True, scale_rewards=False,
        place={"strategy": strategy},
    )  # fmt: skip


def objectives(make):
    """Stages that learn by each objective, with three updates from a rollout."""
    plan = {}
    for name, (algorithm, settings) in OBJECTIVES.items():
        ppo = algorithm == "ppo"
        values = {"batch_size": 32, "ppo_epochs": 3} if ppo else {"batch_size": 8, "epochs": 3}
        job = make(
            algorithm, steps=12, learning_rate=1e-2, kl_coef=0.0, missing_eos_penalty=0.0,
            place={"micro_batch_size": 16}, **(values | settings),
        )  # fmt: skip
        plan[f"{name}-learns"] = (job, {})
    return plan


@pytest.fixture(scope="module")
def service():
    """Scores a reply by its share of letters, sooner or later."""
    pauses = itertools.cycle([0.0, 0.05, 0.01])

    def letters(path, body):
        time.sleep(next(pauses))
        replies = [item["reply"] for item in body["items"]]
        shares = [sum(c.isascii() and c.isalpha() for c in r) / max(1, len(r)) for r in replies]
        return {"scores": shares, "components": {"long": [len(r) for r in replies]}}

    server = StandIn(letters)
    yield server
    server.close()


def served(make, service, **settings):
    rewards = [{"type": "model"}, {"type": "http", "url": service.url, "weight": 0.5} | settings]
    return make("grpo", steps=2, rewards=rewards)


@pytest.fixture(scope="module")
def one_rank(run_plan, make, data, random_rewards, service):
    """Every variant that one rank runs, in one process."""
    jobs = {
        "grpo-updates": make("grpo", minibatches=2, epochs=2, steps=2),
        "grpo-dr": make("grpo", scale_rewards=False, average="token", steps=2),
        "ppo": make("ppo", batch_size=8, ppo_epochs=2, warmup_fraction=0.1, schedule="linear",
                    place={"micro_batch_size": 2}),
        "collapsed": collapsing(make, "grpo", learning_rate=0.03, max_kl=0.5),
        "collapsed-early": make("rloo", learning_rate=0.03, max_kl=0.5, collapse_window=2,
                                steps=15),
    }  # fmt: skip
    plan = {name: (job, {}) for name, job in jobs.items()}
    plan["evaluated"] = (evaluated(make), {})
    plan["ppo-rule"] = (make("ppo"), {"rule": True})
    plan["rloo-rule"] = (make("rloo"), {"rule": True})
    plan["shaped"] = (shaped(make, random_rewards), {})
    plan["served"] = (served(make, service), {})
    plan["served-again"] = (served(make, service, batch_size=1, parallel=3), {})
    for name in NEW:
        job = make(name, steps=4)
        plan[name] = (job, {})
        plan[f"{name}-half"] = (job, {"where": f"{name}-cut", "stop_after": 2})
        plan[f"{name}-rest"] = (job, {"where": f"{name}-cut"})
        plan[f"{name}-lora"] = (make(name, lora=LoRA(rank=2, alpha=8), learning_rate=1e-2), {})
        plan[f"{name}-ptx"] = (mixing(make, data, name), {})
        plan[f"{name}-micro"] = (make(name, steps=4, place={"micro_batch_size": 2}), {})
        learns = make(
            name, steps=12, batch_size=32 if name == "reinforce_pp" else 8, learning_rate=1e-2,
            epochs=2, kl_coef=0.0, missing_eos_penalty=0.0, place={"micro_batch_size": 16},
        )  # fmt: skip
        plan[f"{name}-learns"] = (learns, {})
    for name, settings in HELD.items():  # much KL
        plan[name] = (make(name.split("-")[0], kl_coef=5.0, **settings), {})
    return run_plan(1, plan)


@pytest.fixture(scope="module")
def by_objective(run_plan, make):
    return run_plan(1, objectives(make))


@pytest.fixture(scope="module")
def two_ranks(run_plan, make, data, random_rewards, service):
    kinds = {"grpo": "ddp", "rloo": "zero2", "reinforce_pp": "zero1"}
    plan = {n: (make(n, steps=4, place={"strategy": kinds[n]}), {}) for n in NEW}
    plan["grpo-ptx"] = (mixing(make, data, "grpo", place={"micro_batch_size": 2}), {})
    plan["rloo-rule"] = (make("rloo"), {"rule": True})
    plan["shaped"] = (shaped(make, random_rewards, strategy="fsdp2"), {})
    plan["evaluated"] = (evaluated(make, "fsdp2"), {})
    plan["served"] = (served(make, service), {})
    plan["collapsed"] = (collapsing(make, "ppo", "fsdp2", max_kl=0.2, ppo_epochs=2), {})
    return run_plan(2, plan)


def column(run, name):
    return [m[name] for m in run.metrics]


def assert_same_course(first, second):
    for name in SHARED:
        np.testing.assert_allclose(
            column(first, name), column(second, name), atol=2e-3, err_msg=name
        )


@pytest.mark.parametrize("name", NEW)
def test_algorithm_raises_the_score_it_optimises(one_rank, name):
    assert_raised(one_rank[f"{name}-learns"])


@pytest.mark.long
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_raises_the_score_within_its_bound(by_objective, name):
    assert_raised(by_objective[f"{name}-learns"])


def assert_raised(run):
    scores = column(run, "score")
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.5, scores
    assert max(column(run, "clip_fraction")) > 0, "a bound that was never reached shows nothing"


@pytest.mark.parametrize("name", NEW)
def test_first_rollout_is_the_reference_own(one_rank, name):
    first = one_rank[name].metrics[0]
    assert abs(first["kl"]) < 1e-4
    assert first["rollout_logprob_gap"] < 1e-4
    assert first["reward_model"] == pytest.approx(first["score"])


@pytest.mark.parametrize("name", NEW)
def test_micro_batches_do_not_change_what_is_learned(one_rank, name):
    first, second = one_rank[name], one_rank[f"{name}-micro"]
    assert_same_course(first, second)
    others = second.weights()
    for key, value in first.weights().items():
        np.testing.assert_allclose(value, others[key], atol=2e-4, err_msg=key)


@pytest.mark.parametrize("name", NEW)
def test_two_ranks_train_as_one_does(one_rank, two_ranks, name):
    assert_same_course(one_rank[name], two_ranks[name])


def test_two_ranks_combine_and_shape_scores_as_one_does(one_rank, two_ranks):
    first, second = one_rank["shaped"], two_ranks["shaped"]
    assert_same_course(first, second)
    for name in ("reward_model", "reward_model_std", "score_clipped", "reward"):
        np.testing.assert_allclose(column(first, name), column(second, name), atol=2e-3)
    for line in first.metrics:
        assert line["reward_model_std"] > 0 and 0 < line["score_clipped"] < 1
        # whitened to mean 0, less 1 for each reply that was cut
        assert line["reward"] == pytest.approx(line["finished"] - 1.0, abs=1e-5)


@pytest.mark.parametrize("name", NEW)
def test_resumed_run_ends_in_the_same_artifact(one_rank, name):
    whole, half, rest = (one_rank[f"{name}{part}"] for part in ("", "-half", "-rest"))
    assert "the checkpoint after step 2" in half.said
    assert whole.artifact.digest == rest.artifact.digest
    assert column(rest, "step") == [1, 2, 3, 4]


def test_ppo_computes_what_it_did_before_it_shared_anything(one_rank):
    before = {
        "score": [-0.020243, 0.435199, 0.113052],
        "kl": [0.0, 0.143034, 0.230344],
        "policy_loss": [-0.060954, -0.029434, -0.011023],
    }
    for name, values in before.items():
        np.testing.assert_allclose(column(one_rank["ppo"], name), values, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", HELD)
def test_kl_holds_the_policy_back(one_rank, name):
    free, held = (column(one_rank[n], "kl_k3")[2] for n in (name.split("-")[0], name))
    assert held < free


@pytest.mark.parametrize("variant", ("grpo-updates", "grpo-dr", "rloo-lora"))
def test_variants_move_the_policy(stages, models, one_rank, variant):
    before = stages.weights(stages.store.get(models["llama"]))
    after = one_rank[variant].weights()
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", NEW)
def test_reference_of_an_adapter_stays_where_it_was(one_rank, name):
    run = one_rank[f"{name}-lora"]
    kl = column(run, "kl_k3")
    assert kl[0] < 1e-6
    assert kl[-1] > 1e-4, "the policy has left it"
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert run.artifact.file(file).size > 0


@pytest.mark.parametrize("name", NEW)
def test_text_that_is_mixed_in_is_learned(one_rank, name):
    losses = column(one_rank[f"{name}-ptx"], "ptx_loss")
    assert losses[-1] < losses[0] - 0.2, losses


def test_two_ranks_mix_in_what_one_does(one_rank, two_ranks):
    first, second = one_rank["grpo-ptx"], two_ranks["grpo-ptx"]
    assert_same_course(first, second)
    np.testing.assert_allclose(column(first, "ptx_loss"), column(second, "ptx_loss"), rtol=1e-3)


def test_rules_alone_need_no_reward_model(one_rank, two_ranks):
    for run in (one_rank["ppo-rule"], one_rank["rloo-rule"], two_ranks["rloo-rule"]):
        for line in run.metrics:
            assert line["score"] == pytest.approx(0.5 * line["reward_letters"], abs=1e-6)
            assert 0 < line["reward_letters"] < 1
            assert "reward_model" not in line
            assert line["failure_seen"] == 16, "of this rollout, from all ranks"
    # Each rank scores its share; all see all.
    assert_same_course(one_rank["rloo-rule"], two_ranks["rloo-rule"])


def test_service_scores_replies_whenever_and_wherever_it_is_asked(one_rank, two_ranks):
    first, again = one_rank["served"], one_rank["served-again"]
    assert first.job.key() == again.job.key(), "how a service is asked is not in the key"
    assert first.artifact.files == again.artifact.files
    for line in first.metrics:
        total = line["reward_model"] + 0.5 * line["reward_http"]
        assert line["score"] == pytest.approx(total, abs=1e-5) and 0 < line["reward_http"] < 1
        assert line["reward_http/long"] > 1
    assert_same_course(first, two_ranks["served"])


def test_two_ranks_find_the_best_evaluation_that_one_does(one_rank, two_ranks):
    first, second = one_rank["evaluated"], two_ranks["evaluated"]
    names = [name for name in first.metrics[0] if name.startswith("heldout_")]
    assert "heldout_reward_length" in names and len(names) > 10
    for line, other in zip(first.metrics, second.metrics, strict=True):
        for name in names:
            assert line[name] == pytest.approx(other[name], abs=2e-3), (line["step"], name)
        cut = 1 - line["heldout_finished"]
        assert line["heldout_reward"] == pytest.approx(line["heldout_score"] - cut, abs=1e-5), (
            "not whitened: all policies would have the same"
        )
    best = max(first.metrics[1:], key=lambda line: line["heldout_reward_length"])["step"]
    for run in (first, second):
        found = run.artifact.metadata["metrics"]
        assert found["best"] == {"step": best, "by": "heldout_reward_length", "within": True}
        assert found["score"] == pytest.approx(found["reward_model"]), "the rule has weight 0"
    others = second.weights()
    for key, value in first.weights().items():
        np.testing.assert_allclose(value, others[key], atol=2e-4, err_msg=key)


@pytest.mark.parametrize("ranks", (1, 2))
def test_collapse_publishes_the_last_good_policy_as_a_candidate(one_rank, two_ranks, ranks):
    run = (one_rank if ranks == 1 else two_ranks)["collapsed"]
    job, store, said = run.job, run.store, run.said
    at = run.metrics[-1]["step"]
    means = [(a + b) / 2 for a, b in pairwise(column(run, "kl"))]
    assert means[-1] > job.max_kl and all(m <= job.max_kl for m in means[:-1]), "at the first"
    assert f"{job.algorithm} step {at}: the KL to the SFT model (nats a reply) is" in said
    assert f"above {job.algorithm}.max_kl {job.max_kl:g}" in said
    assert f"Raise {job.algorithm}.kl_coef" in said
    assert run.artifact is None, "a retry must not take it for the result"

    [candidate] = [a for a in store.list("model") if a.metadata.get("candidate")]
    assert candidate.ref in said and candidates.read(store, job.key()) == candidate
    reason = f"collapsed at step {at}: kl {means[-1]:.4g} above max_kl {job.max_kl:g}; weights of"
    assert candidate.metadata["reason"] == f"{reason} step {at - 2}"
    assert candidate.metadata["collapsed"]["value"] == pytest.approx(means[-1])
    assert candidate.metadata["metrics"]["steps"] == at - 2
    checkpoints = store.scoped(f"checkpoints/{job.key()}")
    [good] = [a for a in checkpoints.list("checkpoint") if a.metadata["step"] == at - 2]
    kept = open_saved(checkpoints.fetch(good.digest))
    found = load_file(store.fetch(candidate.digest) / "model.safetensors")
    for name, value in found.items():
        assert np.array_equal(value, kept.whole(f"policy.model.{name}").numpy()), name


def test_collapse_before_the_first_checkpoint_has_no_candidate(one_rank):
    run = one_rank["collapsed-early"]
    assert "No checkpoint from before these rollouts" in run.said
    assert "checkpoint_every is 1000" in run.said
    assert not [a for a in run.store.list("model") if a.metadata.get("candidate")]
    assert candidates.read(run.store, run.job.key()) is None
