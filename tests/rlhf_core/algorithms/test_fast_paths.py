"""Every algorithm computes the same with transformers' own code everywhere."""

import pytest

from rlhf_core.jobs import (
    DPOJob,
    GRPOJob,
    KTOJob,
    ORPOJob,
    PPOJob,
    PretrainJob,
    ReinforcePPJob,
    Resources,
    RewardJob,
    RLOOJob,
    SFTJob,
    SimPOJob,
)
from rlhf_core.nn import fast_paths, unpadded
from rlhf_core.nn.fast_paths import FastPath
from rlhf_core.nn.shared_trunk import Trunk
from rlhf_core.rollout import grouped_attention, kv_cache
from rlhf_core.runtime import rank
from rlhf_core.training.online import models as online
from tests.rlhf_core.torchrun import run_ranks

pytestmark = pytest.mark.slow

OFFLINE = {
    "sft": SFTJob, "pretrain": PretrainJob, "reward": RewardJob, "dpo": DPOJob, "simpo": SimPOJob,
    "orpo": ORPOJob, "kto": KTOJob,
}  # fmt: skip
ONLINE = {"ppo": PPOJob, "grpo": GRPOJob, "rloo": RLOOJob, "reinforce_pp": ReinforcePPJob}
DATA = {"sft": "sft", "pretrain": "pretrain", "kto": "unpaired"}


@pytest.fixture(scope="module")
def make(models, data, random_reward):
    """algorithm, fast -> a job of two steps on one rank."""

    def made(algorithm: str, fast: bool):
        place = Resources(micro_batch_size=4, device="cpu", threads=1, fast_paths=fast)
        common = {
            "model": models["llama"], "learning_rate": 1e-3, "precision": "fp32",
            "warmup_fraction": 0.0, "resources": place,
        }  # fmt: skip
        if algorithm in OFFLINE:
            common |= {"data": data[DATA.get(algorithm, "preference")], "batch_size": 8}
            common |= {"length": 32} if algorithm == "pretrain" else {}
            if algorithm == "reward":
                common |= {"head": "random", "normalization_prompts": 4, "max_new_tokens": 4}
            return OFFLINE[algorithm](**common, max_steps=2)
        common |= {"reward_model": random_reward, "prompts": data["prompts"], "steps": 2}
        common |= {"batch_size": 2, "group_size": 4} if algorithm in ("grpo", "rloo") else {}
        if algorithm == "ppo":
            common |= {"trainable_layers": 1}
        return ONLINE[algorithm](**{"batch_size": 8, "max_new_tokens": 6} | common)

    return made


@pytest.fixture
def used(monkeypatch) -> set[str]:
    """Names of the fast paths that a model was allowed to take."""
    found: set[str] = set()
    works = FastPath.works

    def watched(self, model):
        if allowed := works(self, model):
            found.add(self.name)
        return allowed

    monkeypatch.setattr(FastPath, "works", watched)
    return found


@pytest.mark.parametrize("algorithm", [*OFFLINE, *ONLINE])
def test_losses_are_those_of_transformers_own_code(algorithm, make, stages, used, capsys) -> None:
    _, fast = stages.run_here(make(algorithm, True), f"fast-paths-{algorithm}")
    assert len(used) >= (1 if algorithm == "pretrain" else 2)
    if algorithm in ONLINE:
        assert {kv_cache.PATH.name, grouped_attention.PATH.name, unpadded.PATH.name} <= used
    if algorithm == "ppo":
        assert "the lower 2 layers run once for all 4 models" in capsys.readouterr().out
    used.clear()
    _, plain = stages.run_here(make(algorithm, False), f"plain-paths-{algorithm}")
    assert used == set()
    assert fast_paths.switched_on(), "as before the job"
    assert len(fast) == len(plain) == 2
    for one, other in zip(fast, plain, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"accuracy"}:  # signs of margins near 0
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_a_rank_applies_the_setting_to_its_job_and_the_key_does_not_know_of_it(
    make, stages, tmp_path, used, capsys
) -> None:
    job = make("sft", False)
    assert job.key() == make("sft", True).key()
    rank.run_job(job, stages.store, tmp_path)
    assert used == set()
    assert "resources.fast_paths is false" in capsys.readouterr().out
    assert fast_paths.switched_on()


def test_a_stages_log_says_which_fast_path_is_off(models, data, stages) -> None:
    """bloom attends in a way of its own."""
    job = RewardJob(
        model=models["bloom"], data=data["preference"], batch_size=4, max_steps=1, head="random",
        precision="fp32", normalization_prompts=4, max_new_tokens=4,
        resources=Resources(device="cpu", threads=1),
    )  # fmt: skip
    done = run_ranks(1, "rlhf_core.__main__", str(stages.write(job) / "job.json"), env=stages.env)
    off = [line for line in done.stdout.splitlines() if line.startswith("fast path off")]
    assert len(off) == 2 and len(set(off)) == 2, "each once, though two models of a kind are asked"
    assert "rows without padding (its attention is eager, not sdpa). Lost: " in off[0]
    assert "pairs that share a row" in off[1]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_trunk_ends_in_the_same_bytes_as_whole_models(
    stages, models, data, random_reward, algorithm, monkeypatch
):
    common = {
        "model": models["llama"], "reward_model": random_reward, "prompts": data["prompts"],
        "steps": 2, "max_new_tokens": 6, "trainable_layers": 1, "learning_rate": 1e-3,
        "resources": Resources(micro_batch_size=2, device="cpu", threads=1),
    }  # fmt: skip
    if algorithm == "ppo":
        job = PPOJob(**common, batch_size=8, ppo_epochs=2, minibatches=2)
    else:
        job = GRPOJob(**common, batch_size=4, group_size=2, epochs=2)
    runs = []
    ran = []
    run = Trunk.run
    monkeypatch.setattr(Trunk, "run", lambda self, *batch: ran.append(1) or run(self, *batch))
    for share in (True, False):
        if not share:
            monkeypatch.setattr(online, "find_trunk", lambda models: None)
        runs.append((*stages.run_here(job, f"{algorithm}-{share}"), len(ran)))
    assert runs[0][:2] == runs[1][:2]
    assert runs[0][2] > 1 and runs[1][2] == runs[0][2], "the trunk ran, and only where shared"
