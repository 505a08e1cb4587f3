"""SFT, reward model and PPO as real jobs on real ranks."""

import json

import numpy as np
import pytest

from rlhf_core.jobs import LoRA, PPOJob, Resources, RewardJob, SFTJob

pytestmark = pytest.mark.slow

SMALL = {"precision": "fp32", "schedule": "constant", "warmup_fraction": 0.0}


MITIGATED = {"center_coef": 0.1, "length_debias": True}


def resources(**kwargs):
    return Resources(**({"micro_batch_size": 4, "checkpoint_every": 1000, "threads": 1} | kwargs))


def sft_job(models, data, **kwargs):
    values = {"model": models["llama"], "data": data["sft"], "batch_size": 8, "max_steps": 6,
              "learning_rate": 1e-3, "resources": resources(), **SMALL}  # fmt: skip
    return SFTJob(**(values | kwargs))


def nf4_job(models, data, **kwargs):
    lora = LoRA(rank=2, alpha=8)
    return sft_job(
        models, data, quantization="nf4", lora=lora, max_steps=3, learning_rate=1e-2, **kwargs
    )


def reward_job(models, data, **kwargs):
    values = {"model": models["llama"], "data": data["preference"], "batch_size": 16,
              "max_steps": 40, "epochs": 20, "learning_rate": 1e-3, "normalization_prompts": 16,
              "max_new_tokens": 8, "resources": resources(), **SMALL}  # fmt: skip
    return RewardJob(**(values | kwargs))


def ppo_job(models, data, reward, **kwargs):
    values = {"model": models["llama"], "reward_model": reward, "prompts": data["prompts"],
              "batch_size": 16, "steps": 3, "ppo_epochs": 2, "max_new_tokens": 6,
              "learning_rate": 1e-3, "resources": resources(), **SMALL}  # fmt: skip
    return PPOJob(**(values | kwargs))


@pytest.fixture(scope="module")
def reward(stages, models, data):
    return stages.run(reward_job(models, data))[0]


@pytest.fixture(scope="module")
def one_rank(stages, models, data, reward):
    """Every variant that one rank runs, in one process: name -> artifact."""
    digest = reward.digest
    lora = LoRA(rank=2, alpha=8)
    ckpt = resources(gradient_checkpointing=True)
    jobs = {
        "sft": sft_job(models, data),
        "sft-micro-1": sft_job(models, data, seed=0, resources=resources(micro_batch_size=1)),
        "sft-checkpointing": sft_job(models, data, resources=ckpt),
        "sft-lora": sft_job(models, data, lora=lora, max_steps=12, learning_rate=1e-2),
        "sft-nf4": nf4_job(models, data),
        "sft-lora-gpt2": sft_job(
            models, data, model=models["gpt2"], lora=lora, max_steps=3, learning_rate=1e-2
        ),
        "sft-top": sft_job(models, data, trainable_layers=1, max_steps=12, learning_rate=1e-2),
        "reward-lora": reward_job(models, data, lora=lora, learning_rate=1e-2),
        "reward-top": reward_job(models, data, trainable_layers=1, max_steps=3),
        "reward-mitigated": reward_job(models, data, max_steps=3, **MITIGATED),
        "ppo": ppo_job(models, data, digest),
        "ppo-minibatches": ppo_job(models, data, digest, minibatches=2),
        "ppo-ptx": ppo_job(models, data, digest, ptx=data["sft"], ptx_coef=5.0, steps=5),
        "ppo-ptx-text": ppo_job(models, data, digest, ptx=data["pretrain"], ptx_coef=5.0, steps=5),
        "ppo-lora": ppo_job(models, data, digest, lora=lora, learning_rate=1e-2),
        "ppo-top": ppo_job(models, data, digest, trainable_layers=1),
        "ppo-bf16": ppo_job(models, data, digest, precision="bf16"),
        "ppo-learns": ppo_job(
            models, data, digest, steps=24, batch_size=32, kl_coef=0.02, missing_eos_penalty=0.0,
            learning_rate=4e-3, ppo_epochs=2, resources=resources(micro_batch_size=32),
        ),
    }  # fmt: skip
    # Jobs that differ in placement only have one stage key; each needs its own to run at all.
    jobs["sft-micro-1"] = jobs["sft-micro-1"].model_copy(update={"weight_decay": 1e-12})
    jobs["sft-checkpointing"] = jobs["sft-checkpointing"].model_copy(update={"weight_decay": 2e-12})
    return dict(zip(jobs, stages.run(*jobs.values()), strict=True))


@pytest.fixture(scope="module")
def two_ranks(stages, models, data, reward):
    """The same on two ranks, in a store that does not know the results of one rank."""
    jobs = {}
    for i, kind in enumerate(("ddp", "zero1", "zero2")):
        # A weight decay too small to matter gives each its own stage key.
        update = {"weight_decay": (i + 3) * 1e-12, "resources": resources(strategy=kind)}
        jobs[f"sft-{kind}"] = sft_job(models, data, **update)
        jobs[f"ppo-{kind}"] = ppo_job(models, data, reward.digest, **update)
    jobs["reward"] = reward_job(models, data, weight_decay=1e-12)
    jobs["reward-mitigated"] = reward_job(
        models, data, max_steps=3, weight_decay=1e-12, **MITIGATED
    )
    jobs["sft-nf4"] = nf4_job(models, data, weight_decay=1e-12)
    jobs["sft-lora"] = sft_job(
        models, data, lora=LoRA(rank=2, alpha=8), max_steps=12, learning_rate=1e-2,
        weight_decay=1e-12, resources=resources(strategy="zero2"),
    )  # fmt: skip
    return dict(zip(jobs, stages.run(*jobs.values(), ranks=2), strict=True))


def losses(stages, artifact, name="loss"):
    return [m[name] for m in stages.metrics(artifact)]


def assert_same_weights(stages, a, b, atol):
    first, second = stages.weights(a), stages.weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], atol=atol, err_msg=name)


def test_sft_lowers_the_heldout_loss(stages, one_rank):
    run = losses(stages, one_rank["sft"])
    assert run[-1] < run[0] - 0.2


@pytest.mark.parametrize("variant", ("sft-micro-1", "sft-checkpointing"))
def test_micro_batches_and_checkpointing_do_not_change_sft(stages, one_rank, variant):
    np.testing.assert_allclose(
        losses(stages, one_rank[variant]), losses(stages, one_rank["sft"]), rtol=1e-4
    )
    assert_same_weights(stages, one_rank[variant], one_rank["sft"], atol=2e-4)


@pytest.mark.parametrize("kind", ("ddp", "zero1", "zero2"))
def test_two_ranks_train_sft_as_one_does(stages, one_rank, two_ranks, kind):
    np.testing.assert_allclose(
        losses(stages, two_ranks[f"sft-{kind}"]), losses(stages, one_rank["sft"]), rtol=1e-4
    )
    assert_same_weights(stages, two_ranks[f"sft-{kind}"], one_rank["sft"], atol=2e-4)


def test_two_ranks_train_adapters_of_quantised_weights_as_one_does(stages, one_rank, two_ranks):
    found, expected = two_ranks["sft-nf4"], one_rank["sft-nf4"]
    np.testing.assert_allclose(losses(stages, found), losses(stages, expected), rtol=1e-4)


@pytest.mark.parametrize("kind", ("ddp", "zero1", "zero2"))
def test_two_ranks_sample_and_train_ppo_as_one_does(stages, one_rank, two_ranks, kind):
    for name in ("score", "length", "kl", "policy_loss", "value_loss"):
        np.testing.assert_allclose(
            losses(stages, two_ranks[f"ppo-{kind}"], name),
            losses(stages, one_rank["ppo"], name),
            atol=2e-3, err_msg=name,
        )  # fmt: skip


@pytest.mark.parametrize("variant", ("sft-lora", "sft-top"))
def test_adapters_and_top_layers_learn(stages, one_rank, variant):
    run = losses(stages, one_rank[variant])
    assert run[-1] < run[0] - 0.1


@pytest.mark.parametrize(
    ("ranks", "variant", "base"),
    [("one_rank", "sft-lora", "llama"), ("one_rank", "sft-lora-gpt2", "gpt2"),
     ("two_ranks", "sft-lora", "llama"), ("one_rank", "ppo-lora", "llama")],
)  # fmt: skip
def test_adapter_on_the_plain_base_is_the_merged_model(
    stages, models, request, ranks, variant, base
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = stages.store.fetch(request.getfixturevalue(ranks)[variant].digest)
    ids = torch.arange(40, 60).view(2, 10)
    model = AutoModelForCausalLM.from_pretrained(stages.store.fetch(models[base])).eval()
    with torch.no_grad():
        before = model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        adapted = PeftModel.from_pretrained(model, folder / "adapter").eval()(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert (merged - before).abs().max() > 1e-2
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"artifact:{models[base]}"


def test_top_layers_leave_the_lower_ones_untouched(stages, models, one_rank):
    before = stages.weights(stages.store.get(models["llama"]))
    after = stages.weights(one_rank["sft-top"])
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    top = (".layers.2.", "model.norm.weight", "lm_head.weight")  # the tiny model's head is untied
    assert changed and all(any(t in n for t in top) for n in changed), changed


def test_reward_model_learns_what_wins(reward, one_rank, two_ranks):
    assert one_rank["reward-lora"].file("adapter/adapter_model.safetensors").size > 0
    for artifact in (reward, one_rank["reward-lora"], two_ranks["reward"]):
        heldout = artifact.metadata["metrics"]["heldout"]
        assert heldout["accuracy"] > 0.9
        assert heldout["low"] > 0.5
        assert set(heldout["baselines"]) == {"length", "bag_of_words"}
        assert heldout["baselines"]["bag_of_words"]["accuracy"] > 0.9, "yes against no is easy"
        assert -1.0 <= heldout["length_correlation"] <= 1.0


def test_two_ranks_train_a_centred_and_debiased_reward_model_as_one_does(
    stages, one_rank, two_ranks
):
    expected = losses(stages, one_rank["reward-mitigated"])
    found = losses(stages, two_ranks["reward-mitigated"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected != losses(stages, one_rank["reward-top"])


def test_reward_scores_are_normalised(reward):
    metrics = reward.metadata["metrics"]
    assert metrics["score_std"] > 0
    assert np.isfinite(metrics["score_mean"])


def test_ppo_starts_at_the_reference_and_reports(stages, one_rank):
    first = stages.metrics(one_rank["ppo"])[0]
    assert abs(first["kl"]) < 1e-4, "before any update policy and reference are one model"
    assert first["rollout_logprob_gap"] < 1e-4
    assert first["approx_kl"] >= 0
    assert 1 <= first["length"] <= 6


def test_ppo_raises_the_score_it_optimises(stages, one_rank):
    scores = losses(stages, one_rank["ppo-learns"], "score")
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.5, scores


@pytest.mark.parametrize("variant", ["ppo-ptx", "ppo-ptx-text"])
def test_text_that_is_mixed_in_is_learned(stages, one_rank, variant):
    found = losses(stages, one_rank[variant], "ptx_loss")
    assert found[-1] < found[0] - 0.2, found


def test_without_ptx_there_is_no_such_metric(stages, one_rank):
    assert "ptx_loss" not in stages.metrics(one_rank["ppo"])[0]


@pytest.mark.parametrize("variant", ("ppo-minibatches", "ppo-lora", "ppo-top", "ppo-bf16"))
def test_ppo_variants_move_the_policy(stages, models, one_rank, variant):
    before = stages.weights(stages.store.get(models["llama"]))
    after = stages.weights(one_rank[variant])
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[n], after[n]) for n in before)


def test_published_folder_opens_without_this_project(stages, one_rank):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = stages.store.fetch(one_rank["ppo-lora"].digest)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]
