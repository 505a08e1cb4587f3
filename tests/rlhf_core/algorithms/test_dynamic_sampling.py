"""Flat groups are replaced by replies to further prompts, the same ones after a restart."""

import itertools

import pytest
import torch

from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import GRPOJob, Resources, RLOOJob
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.online import dynamic_sampling
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow

MODULES = {"grpo": "rlhf_core.algorithms.grpo", "rloo": "rlhf_core.algorithms.rloo"}


def solved(prompts, replies, rows, finished):
    """A verifier: prompts with an even number are always solved, the others by some replies."""
    even = [int(p[-1]["content"].rpartition(" ")[2]) % 2 == 0 for p in prompts]
    by_reply = [sum(map(ord, reply)) % 3 == 0 for reply in replies]
    return [1.0 if e else float(r) for e, r in zip(even, by_reply, strict=True)]


REWARDS = [
    {"type": "python", "function": f"{__name__}:solved"},
    {"type": "length", "target": 4, "width": 4, "weight": 0.5},  # differs in almost every group
]


@pytest.fixture
def make(models, data, random_reward):
    def made(kind=GRPOJob, **settings):
        values = {
            "model": models["llama"], "prompts": data["prompts"], "steps": 4, "max_new_tokens": 6,
            "rewards": REWARDS, "batch_size": 8, "group_size": 2, "max_resamples": 2,
            "learning_rate": 3e-3, "precision": "fp32", "missing_eos_penalty": 0.0,
            "resources": Resources(micro_batch_size=16, threads=1, device="cpu",
                                   checkpoint_every=1),
        }  # fmt: skip
        return kind(**(values | settings))

    return made


@pytest.fixture
def seen(monkeypatch):
    """Of each rollout that is trained on: rows, and rewards by name."""
    import importlib

    found = []
    for name in MODULES.values():
        module = importlib.import_module(name)

        def watched(stage, step, experience, update, report=module.report_and_save):
            found.append((experience.rollout.rows, experience.components))
            report(stage, step, experience, update)

        monkeypatch.setattr(module, "report_and_save", watched)
    return found


def test_groups_without_a_difference_are_replaced_in_the_order_of_the_epochs(stages, make, seen):
    job = make()
    artifact = stages.train_here(job, "dynamic")
    lines = stages.metrics(artifact)
    size, count = job.group_size, job.batch_size
    prompts = [row["prompt"] for row in sorted_rows(stages, job)]
    n = len(prompts)
    order = list(itertools.chain(*(batch_rows(n, n, epoch, job.seed) for epoch in range(3))))
    position, replaced, flat_left = 0, 0, 0
    for line, (rows, components) in zip(lines, seen, strict=True):
        taken = [prompts[i] for i in order[position : int(line["prompts_sampled"])]]
        first, further = taken[:count], taken[count:]
        groups = [rows[i]["prompt"] for i in range(0, len(rows), size)]
        outcomes = components["python"].view(-1, size)
        flat = [len(set(group.tolist())) == 1 for group in outcomes]
        others = [g for g, own in zip(groups, first, strict=True) if g != own]
        rest = iter(further)
        assert all(prompt in rest for prompt in others), "in their order"
        assert line["groups_replaced"] == len(others)
        assert line["groups_still_flat"] == sum(flat)
        kept = [own for own, g, f in zip(first, groups, flat, strict=True) if f]
        assert kept == [g for g, f in zip(groups, flat, strict=True) if f], "the first ones stay"
        assert line["resample_rounds"] == 2 or not any(flat)
        assert all(rows[i]["prompt"] == rows[i + 1]["prompt"] for i in range(0, len(rows), size))
        position, replaced = int(line["prompts_sampled"]), replaced + len(others)
        flat_left += sum(flat)
    assert replaced > 5 and flat_left > 0, "both happen"
    assert position > n, "the next epoch goes on"
    # the shaped sum differs where the outcome does not
    assert sum(line["flat_groups"] for line in lines) * count < flat_left


def sorted_rows(stages, job):
    from rlhf_core.data.dataset.reading import Rows

    rows = Rows(stages.store.fetch(job.prompts), "train", purpose="prompts")
    return rows.take(range(len(rows)))


class Cut(Exception):
    """The end that was asked for."""


@pytest.mark.parametrize("kind", [GRPOJob, RLOOJob])
def test_resumed_run_ends_in_the_same_bytes(stages, make, kind, monkeypatch):
    job = make(kind, steps=3)
    name = f"dynamic-{job.algorithm}"
    whole = stages.train_here(job, name)
    go_on = Checkpointer.after_step

    def after_step(self, done, total, counters=None):
        go_on(self, done, total, counters)
        if done == 1:
            self._uploads.wait()
            raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Checkpointer, "after_step", after_step)
        stages.train_here(job, f"{name}-cut")
    rest = stages.train_here(job, f"{name}-cut", resume=True)
    assert weight_hashes(rest) == weight_hashes(whole)
    assert stages.metrics(rest) == stages.metrics(whole)


def test_reward_model_can_be_the_outcome(stages, make, random_reward, seen, monkeypatch):
    compared = []
    ask = dynamic_sampling.score_all

    def watched(*given):
        compared.append(ask(*given))
        return compared[-1]

    monkeypatch.setattr(dynamic_sampling, "score_all", watched)
    rewards = [{"type": "model"}, REWARDS[0]]
    job = make(reward_model=random_reward, rewards=rewards, outcome_rewards=["model"], steps=1,
               temperature=5.0)  # fmt: skip
    [line] = stages.metrics(stages.train_here(job, "dynamic-model"))
    assert line["groups_replaced"] == 0 and line["resample_rounds"] == 0
    torch.testing.assert_close(compared[0].float(), seen[0][1]["model"], rtol=0, atol=1e-5)


def test_cut_replies_are_left_out_and_counted(stages, make):
    settings = {"mask_truncated_completions": True, "max_resamples": 0, "temperature": 3.0}
    job = make(max_new_tokens=200, steps=1, **settings)
    [line] = stages.metrics(stages.train_here(job, "masked"))
    assert line["masked_replies"] == pytest.approx(1 - line["finished"])
    assert 0 < line["masked_replies"] < 1
    assert line["masked_minibatches"] == 0
    with pytest.raises(
        TrainingFailure, match=r"16 of the 16 replies .* max_new_tokens 2, .* Raise"
    ):
        stages.train_here(make(max_new_tokens=2, min_length=None, **settings), "masked-all")
