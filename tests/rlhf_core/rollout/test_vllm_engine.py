"""vLLM's engine in this process, beside a model that trains."""

from __future__ import annotations

import math
import os
import random

import psutil
import pytest
import torch
import torch.distributed as dist

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import LoRA, Resources, SFTSettings, VllmRollout
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import Policy
from rlhf_core.rollout.engine_weights import policy_weights
from rlhf_core.rollout.handover import Handover
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.training.online.batches import collate_responses
from rlhf_core.training.strategy import Strategy
from tests.rlhf_core.tiny_models import copy_of, wide_copy

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], list(range(20, 60))]
ENDS = set(range(100, 160))  # of 960 tokens: about half of the replies end early
OPTIONS = {"max_new_tokens": 12, "eos_ids": ENDS, "pad_id": 3, "temperature": 0.7}


@pytest.fixture(scope="module", autouse=True)
def strategy():
    yield Strategy(Resources(threads=1, device="cpu"), "fp32", 1.0)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """architecture, precision -> model folder and engine; the engines are closed at the end."""
    engines = []

    def started(architecture, precision="fp32"):
        folder = wide_copy(architecture, tmp_path_factory.mktemp(architecture) / "model")
        settings = VllmRollout(cpu_cache_mib=32)
        engine = VllmEngine(folder, settings, precision=precision, device=CPU, longest=64)
        engines.append(engine)
        return folder, engine

    yield started
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def llama(start):
    return start("llama")


def gap(policy, rollout, prompts=PROMPTS, temperature=0.7):
    """Largest difference from the trainer's log-probability of a sampled token, nats."""
    mask = rollout.response_mask
    replies = [ids[real].tolist() for ids, real in zip(rollout.response_ids, mask, strict=True)]
    sequences = [p + r for p, r in zip(prompts, replies, strict=True)]
    batch = collate_responses(sequences, [len(p) for p in prompts], range(len(prompts)), CPU)
    with torch.no_grad():
        trained = Policy(policy)(*batch, temperature)[batch[2]]  # row after row, both
    return float((trained - rollout.logprobs[mask]).abs().max())


def take_a_step(model):
    """One AdamW update on made-up text."""
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.arange(40).view(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(trained, lr=0.02).step()
    model.zero_grad()


def seeds(count, step=0):
    return make_row_seeds(0, step, range(count))


def test_rollout_keeps_the_contract_of_the_builtin_loop(llama):
    folder, engine = llama
    prompts = PROMPTS * 8
    engine.update(policy_weights(load_causal_lm(folder)))
    found = engine.generate(prompts, row_seeds=seeds(32), **OPTIONS)
    assert found.response_ids.shape == found.logprobs.shape == (32, 12)
    assert 4 < int(found.finished.sum()) < 28
    for ids, real, logprobs, finished in zip(
        found.response_ids.tolist(), found.response_mask.tolist(),
        found.logprobs.tolist(), found.finished.tolist(), strict=True,
    ):  # fmt: skip
        n = sum(real)
        assert real == [True] * n + [False] * (12 - n)
        assert (ids[n - 1] in ENDS) == finished and not ENDS & set(ids[: n - 1])
        assert finished or n == 12
        assert ids[n:] == [3] * (12 - n) and logprobs[n:] == [0.0] * (12 - n)
        assert all(x < 0 for x in logprobs[:n])


def test_replies_are_handed_out_when_they_end(llama):
    folder, engine = llama
    engine.update(policy_weights(load_causal_lm(folder)))
    handed = []
    found = engine.generate(PROMPTS * 8, row_seeds=seeds(32), on_finished=handed.append, **OPTIONS)
    replies = [reply for some in handed for reply in some]
    assert len(handed) > 1 and sorted(r.row for r in replies) == list(range(32))
    for reply in replies:
        real = found.response_mask[reply.row]
        assert found.response_ids[reply.row][real].tolist() == reply.ids
        assert found.logprobs[reply.row][real].tolist() == pytest.approx(reply.logprobs)
        assert bool(found.finished[reply.row]) == reply.finished
    lengths = [[len(reply.ids) for reply in some] for some in handed]
    assert max(lengths[0]) < max(lengths[-1])  # the short ones first


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "bloom"])
def test_engine_follows_the_policy_only_through_update(start, architecture):
    """Untied heads (llama), tied ones, grouped queries, learned positions, alibi."""
    folder, engine = start(architecture)
    model = load_causal_lm(folder)
    engine.update(policy_weights(model))
    for step in range(2):
        assert gap(model, engine.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)) < 1e-3
        take_a_step(model)
        stale = engine.generate(PROMPTS, row_seeds=seeds(4, step), **OPTIONS)
        assert gap(model, stale) > 0.05
        rollout = engine.roll_out(model, PROMPTS, row_seeds=seeds(4, step), **OPTIONS)
        assert gap(model, rollout) < 1e-3


def test_adapters_are_handed_over_with_the_weights(llama):
    folder, engine = llama
    plain = load_causal_lm(folder)
    model = choose_trainable(load_causal_lm(folder), SFTSettings(lora=LoRA(rank=4)), 0)
    for _ in range(2):
        take_a_step(model)
    rollout = engine.roll_out(model, PROMPTS, row_seeds=seeds(4), **OPTIONS)
    assert gap(model, rollout) < 1e-4
    assert gap(plain, rollout) > 0.05
    engine.update(policy_weights(plain))
    assert gap(plain, engine.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)) < 1e-4


def test_engine_of_its_own_with_several_processes_samples_what_one_does(
    llama, tmp_path, monkeypatch
):
    """Tensor parallelism, whose workers read the weights from where they are handed over."""
    # Else it wants a NUMA node for each process.
    monkeypatch.setattr("vllm.envs.VLLM_CPU_OMP_THREADS_BIND", "nobind", raising=False)
    folder, engine = llama
    model = load_causal_lm(folder)
    engine.update(policy_weights(model))
    expected = engine.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)
    settings = VllmRollout(cpu_cache_mib=32, placement="separate", tensor_parallel=2)
    several = VllmEngine(folder, settings, precision="fp32", device=CPU, longest=64)
    try:
        found = [(name, w) for name, w in policy_weights(model)]
        heads = [(name, w.dtype, tuple(w.shape)) for name, w in found]
        handed = Handover.written(tmp_path, heads, [w for _, w in found])
        several.read(handed.path)
        rollout = several.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)
    finally:
        several.close()
    assert not [p for p in psutil.Process().children() if "Worker" in p.name()]
    assert gap(model, rollout) < 1e-3
    assert torch.equal(rollout.response_ids, expected.response_ids)


def test_half_precision_differs_by_rounding(start):
    folder, engine = start("llama", "bf16")
    model = load_causal_lm(folder)
    rollout = engine.roll_out(model, PROMPTS, row_seeds=seeds(4), **OPTIONS)
    assert 1e-5 < gap(model, rollout) < 0.2


def test_engine_without_weights_samples_noise(start):
    folder, engine = start("llama")
    found = engine.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)
    assert gap(load_causal_lm(folder), found) > 0.5


def test_reply_depends_on_its_own_seed_alone(llama):
    folder, engine = llama
    engine.update(policy_weights(load_causal_lm(folder)))
    together = engine.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)
    again = engine.generate(PROMPTS, row_seeds=seeds(4), **OPTIONS)
    assert torch.equal(together.response_ids, again.response_ids)
    assert torch.equal(together.logprobs, again.logprobs)
    for row in (3, 1):
        alone = engine.generate([PROMPTS[row]], row_seeds=[seeds(4)[row]], **OPTIONS)
        assert torch.equal(alone.response_ids[0], together.response_ids[row])
    assert not torch.equal(together.response_ids[0], together.response_ids[2]), "other seeds"
    other = engine.generate(PROMPTS, row_seeds=seeds(4, step=1), **OPTIONS)
    assert not torch.equal(together.response_ids, other.response_ids)


def test_prompts_that_are_not_read_at_once_do_not_change_replies(llama):
    folder, engine = llama
    engine.update(policy_weights(load_causal_lm(folder)))
    prompts = [[i % 90 + 5, *range(200, 250)] for i in range(300)]  # 15,300 tokens
    together = engine.generate(prompts, row_seeds=seeds(300), **OPTIONS)
    for row in (0, 161, 299):
        alone = engine.generate([prompts[row]], row_seeds=[seeds(300)[row]], **OPTIONS)
        assert torch.equal(alone.response_ids[0], together.response_ids[row])


def test_first_tokens_are_distributed_as_the_policy_says(llama):
    folder, engine = llama
    model = load_causal_lm(folder)
    engine.update(policy_weights(model))
    options = OPTIONS | {"max_new_tokens": 1}
    found = engine.generate([PROMPTS[1]] * 2000, row_seeds=seeds(2000), **options)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1]
    p = (logits / 0.7).softmax(0)
    likeliest = p.topk(50).indices
    share = torch.isin(found.response_ids[:, 0], likeliest).double().mean()
    want = float(p[likeliest].sum())
    assert abs(float(share) - want) < 4 * math.sqrt(want * (1 - want) / 2000)
    assert len(set(found.response_ids[:, 0].tolist())) > 300


def test_missing_weights_are_named(llama):
    folder, engine = llama
    weights = dict(policy_weights(load_causal_lm(folder)))
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(
        ModelError, match=r"no weights for 1 of \d+ parameters, e.g. model.layers.1"
    ):
        engine.update(iter(weights.items()))


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [([[5], []], 2, "prompt 1 is empty"), ([[5]], 2, "2 row_seeds for 1 prompts")],
)
def test_wrong_arguments_are_named(llama, prompts, count, message):
    with pytest.raises(ValueError, match=message):
        llama[1].generate(prompts, row_seeds=seeds(count), **OPTIONS)


def test_no_prompts_give_no_replies(llama):
    assert llama[1].generate([], row_seeds=[], **OPTIONS).response_ids.shape == (0, 12)


def test_model_that_vllm_cannot_run_is_refused_at_the_start(tmp_path):
    folder = copy_of("llama", tmp_path / "model")  # heads of width 16
    with pytest.raises(
        ConfigError, match=r"vLLM 0\.\d+.* cannot be started .*head_dim=16.*builtin"
    ):
        VllmEngine(folder, VllmRollout(cpu_cache_mib=32), precision="fp32", device=CPU, longest=64)


def test_cache_that_is_too_small_is_refused_at_the_start(tmp_path):
    folder = wide_copy("bloom", tmp_path / "model")
    with pytest.raises(ConfigError, match="cannot be started for this model"):
        VllmEngine(folder, VllmRollout(cpu_cache_mib=1), precision="fp32", device=CPU, longest=1024)


def test_start_and_close_leave_the_trainer_as_it_was(tmp_path):
    folder = wide_copy("llama", tmp_path / "model")
    model = load_causal_lm(folder)
    torch.manual_seed(5)
    random.seed(5)
    torch.set_num_threads(1)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5)), random.Random(5).random()
    environment = {k: v for k, v in os.environ.items() if "RANK" in k}
    others = {p.pid for p in psutil.Process().children(recursive=True)}

    settings = VllmRollout(cpu_cache_mib=32)
    engine = VllmEngine(folder, settings, precision="fp32", device=CPU, longest=64)
    engine.roll_out(model, PROMPTS, row_seeds=seeds(4), **OPTIONS)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert {k: v for k, v in os.environ.items() if "RANK" in k} == environment
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2, "vLLM puts a function that does nothing there"

    engine.close()
    engine.close()
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in others]
    assert left == []
    total = torch.ones(1)
    dist.all_reduce(total)  # the trainer's process group is still there
    assert total.item() == 1.0
