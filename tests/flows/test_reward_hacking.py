"""A real run made to hack its reward: a high rate, no KL penalty, and no bounds on a collapse."""

import json

import pytest

from rlhf_core.store import registry

from .test_flow import newest_flow_run
from .test_smoke import Pipeline, sets

pytestmark = pytest.mark.slow

HACKING = [
    "stages=[reward, grpo]", "seed=2", "model.source=random:llama",
    "resources={ranks: 1, micro_batch_size: 32, checkpoint_every: 100}",
    "data.prompts={subset: english, max_samples: 200, max_length: 128, max_prompt_length: 48, "
    "heldout_fraction: 0.5}",
    "reward={epochs: 8, max_steps: 15, batch_size: 5, learning_rate: 0.003, precision: fp32, "
    "normalization_prompts: 8, max_new_tokens: 8}",
    "grpo={steps: 16, batch_size: 4, group_size: 8, max_new_tokens: 6, precision: fp32, "
    "learning_rate: 0.02, schedule: constant, warmup_fraction: 0.0, kl_coef: 0.0, max_kl: 1000, "
    "max_repetition: null, min_length: null, missing_eos_penalty: 0.0}",
    "evaluate={judge: vader, max_prompts: 96}", "publish.name=hacked",
]  # fmt: skip


def test_policy_that_hacks_its_reward_is_called_so_and_is_not_promoted(prefect_server, tmp_path):
    rows = [
        {"prompt": f"Tell me about number {i}", "chosen": "good " * (3 + i % 3),
         "rejected": f"the answer {i * 37 % 101} is of no use"} for i in range(24)
    ]  # fmt: skip
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hacked.yaml").write_text("name: hacked\n")
    own = "data.preference={source: pairs.jsonl, heldout_fraction: 0.25}"
    pipeline = Pipeline(tmp_path, prefect_server)
    process = pipeline.fork("run", "--config", "hacked.yaml", *sets([own, *HACKING]))
    try:
        out, err = process.communicate(280)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    assert pipeline.newest()["verdict"] == "reward hacked", out
    assert "\n  verdict   reward hacked: " in out
    state = newest_flow_run().state
    assert state.name == "RewardHacked" and "not promoted" in state.message
    model = registry.read_model(pipeline.store, "hacked")
    assert model.champion is None
    [version] = model.versions
    assert version.state == "candidate" and "replies begin with" in version.reason
