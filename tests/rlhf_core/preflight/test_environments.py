"""What is refused before a stage with an environment starts."""

from __future__ import annotations

import pytest

from rlhf_core.errors import PreflightError
from rlhf_core.model_files.shape import ModelShape, read_shape
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import trained_stages
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.environments import check_environments
from rlhf_core.preflight.settings import check_lengths


def config_of(*settings):
    return build_config("calculator", list(settings))


def shape(context: int) -> ModelShape:
    return read_shape(
        {"model_type": "llama", "vocab_size": 960, "hidden_size": 64, "num_hidden_layers": 2,
         "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": context}
    )  # fmt: skip


def test_memory_is_planned_for_the_longest_episode():
    config = config_of("grpo.environment.max_episode_tokens=700")
    lengths = {stage: length for stage, _, _, length in trained_stages(config)}
    assert lengths["grpo"] == 96 + 700  # max_prompt_length, and the episode
    assert check_lengths(config, shape(800)) == []
    (problem,) = check_lengths(config, shape(780))
    assert "grpo.environment.max_episode_tokens 700 make 796" in problem
    problems = check_lengths(config, shape(600))
    assert any("grpo.environment.max_episode_tokens is 700" in text for text in problems)


def test_calculator_needs_answers():
    assert check_environments(config_of()) == []
    (problem,) = check_environments(config_of("data.prompts.columns={}"))
    assert problem.startswith("grpo.environment: the calculator's reward needs answers")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{type: tools, functions: ["no_such_module_9:f"]}', "cannot be imported"),
        ('{type: tools, servers: [{url: "http://127.0.0.1:9"}]}', "failed 1 time: ConnectError"),
        ('{type: tools, functions: ["math:sqrt"]}', "no fixed name"),
    ],
)
def test_tools_are_made_before_a_run(settings, said):
    rewards = "grpo.rewards=[{type: answer, match: numeric}]"
    (problem,) = check_environments(config_of(f"grpo.environment={settings}", rewards))
    assert problem.startswith("grpo.environment: ") and said in problem


def test_single_replies_cannot_have_the_environments_reward():
    both = "grpo.rewards=[{type: environment}, {type: answer, match: numeric}]"
    assert [reward.type for reward in recipe.online_rewards(config_of(both))] == ["answer"]
    with pytest.raises(PreflightError, match="samples single replies"):
        build_config("rejection_sampling", ["rejection_sampling.rewards=[{type: environment}]"])
