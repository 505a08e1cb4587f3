"""What a list of stages amounts to: steps, data sets, and what cannot follow each other."""

import pytest

from rlhf_core.jobs import DataConfig, DataSettings, PipelineConfig, SampledPreferences
from rlhf_core.pipeline import recipe

READY = DataConfig(preference=DataSettings(source="pairs.jsonl"))


def names(**settings):
    return [step.name for step in recipe.steps(PipelineConfig(**settings))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["sft", "label", "reward", "ppo"]),
        ({"data": READY}, ["sft", "reward", "ppo"]),
        ({"stages": ("reward",)}, ["label", "reward"]),
        ({"stages": ("ppo",)}, ["ppo"]),
        ({"rounds": 2}, ["sft", "label", "reward", "ppo-1", "ppo-2"]),
        ({"reward": {"members": 3}}, ["sft", "label", "reward-1", "reward-2", "reward-3", "ppo"]),
        ({"stages": ("sft", "dpo")}, ["sft", "label", "dpo"]),
        ({"stages": ("sft", "dpo"), "data": READY}, ["sft", "dpo"]),
        ({"stages": ("sft", "reward", "dpo"), "rounds": 2},
         ["sft", "label", "reward", "label-1", "dpo-1", "label-2", "dpo-2"]),
        ({"stages": ("sft", "reward", "dpo", "ppo")}, ["sft", "label", "reward", "dpo", "ppo"]),
        ({"stages": ("pretrain", "sft")}, ["pretrain", "sft"]),
        ({"stages": ("sft", "rejection_sampling")}, ["sft", "best_of_n", "rejection_sampling"]),
        ({"stages": ("sft", "reward", "rejection_sampling", "ppo"), "rounds": 2, "data": READY},
         ["sft", "reward", "best_of_n-1", "rejection_sampling-1", "ppo-1",
          "best_of_n-2", "rejection_sampling-2", "ppo-2"]),
    ],
)  # fmt: skip
def test_steps_follow_the_list(settings, expected):
    assert names(**settings) == expected


def test_only_the_data_that_a_stage_needs_is_prepared():
    def sets(**settings):
        return [name for _, name, _ in recipe.data_sets(PipelineConfig(**settings))]

    assert sets() == ["data.sft", "data.prompts"]
    assert sets(data=READY) == ["data.sft", "data.prompts", "data.preference"]
    assert sets(stages=("reward",), data=READY) == ["data.preference"]
    assert sets(stages=("reward",)) == ["data.prompts"]  # which the pairs are sampled on
    assert sets(stages=("ppo",)) == ["data.prompts"]
    assert sets(stages=("ppo",), ppo={"ptx_coef": 1.0}) == ["data.sft", "data.prompts"]
    rules = {"rewards": [{"type": "must_end", "endings": ["."]}]}
    assert sets(stages=("grpo",), grpo=rules) == ["data.prompts"]
    assert sets(stages=("kto",), data=READY) == ["data.prompts", "data.preference"]
    assert sets(stages=("rejection_sampling",)) == ["data.prompts"]
    unpaired = {"unpaired": DataSettings(source="votes.jsonl", format="unpaired")}
    assert sets(stages=("kto",), data=unpaired) == ["data.prompts", "data.unpaired"]
    mixed = {"ptx": DataSettings(source="text.jsonl", format="text")}
    assert sets(stages=("ppo",), ppo={"ptx_coef": 1.0}, data=mixed) == ["data.prompts", "data.ptx"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stages": ()}, ["stages is empty; expected at least one, such as [sft, reward, ppo]"]),
        ({"stages": ("sft", "sft")}, ["stages has sft twice; use rounds to repeat the alignment"]),
        ({"stages": ("sft", "ppo")}, ["ppo needs a reward model: put reward before ppo in stages, "
                                      "or set reward_model to an existing one"]),
        ({"stages": ("sft", "ppo"), "reward_model": "artifact:abcdef"}, []),
        ({"stages": ("ppo",), "reward_model": ("artifact:abcdef", "judges/2")}, []),
        ({"stages": ("sft", "distill")},
         ["stages has distill, but teacher is empty; set it to a model of the same family, such "
          "as a larger one"]),
        ({"stages": ("sft",), "teacher": "org/large"},
         ["teacher is org/large, but stages ['sft'] has no distill, which would use it; add "
          "distill, or clear teacher"]),
        ({"stages": ("sft", "distill"), "teacher": "org/large"}, []),
        ({"stages": ("sft", "rejection_sampling")},
         ["rejection_sampling needs a reward model: put reward before rejection_sampling in "
          "stages, or set reward_model to an existing one"]),
        ({"stages": ("sft", "rejection_sampling"),
          "rejection_sampling": {"rewards": [{"type": "must_end", "endings": ["."]}]}}, []),
        ({"reward_model": "artifact:abcdef"},
         ["stages has reward and reward_model is set too; leave one out"]),
        ({"stages": ("ppo", "reward")},
         ["stages has reward after ppo; put it before the alignment"]),
        ({"stages": ("sft", "grpo"),
          "grpo": {"rewards": [{"type": "must_end", "endings": ["."]}]}}, []),
        ({"stages": ("pretrain", "sft")},
         ["stages has pretrain, but data.pretrain is empty; give it a source of plain text, such "
          "as {source: texts/*.txt, format: text}"]),
        ({"stages": ("sft",), "rounds": 2},
         ["rounds is 2, but stages ['sft'] has nothing to repeat: add an alignment such as ppo, "
          "or set rounds to 1"]),
        ({"stages": ("reward",), "lm_eval": {"tasks": ["piqa"]}},
         ["lm_eval is set, but stages ['reward'] train no language model to measure; "
          "clear lm_eval"]),
        ({"data": DataConfig(preference=SampledPreferences(labeller="reward_model"))},
         ["data.preference.labeller is reward_model, but there is none yet when the pairs for "
          "training it are made; set reward_model, or use another labeller"]),
    ],
)  # fmt: skip
def test_stages_that_cannot_follow_each_other_are_named(settings, expected):
    assert recipe.problems(PipelineConfig(**settings)) == expected


def test_last_stage_must_be_one_of_the_run():
    config = PipelineConfig(stages=("sft",))
    assert recipe.check_until(config, "sft") == []
    assert recipe.check_until(config, "ppo") == [
        "until is ppo, but this run has no such stage; its stages are model, data, sft, "
        "evaluate, publish"
    ]
    assert recipe.check_until(PipelineConfig(rounds=2), "ppo-1") == []
    assert recipe.stage_names(PipelineConfig(stages=("reward",)))[-1] == "reward"
    measured = PipelineConfig(lm_eval={"tasks": ["piqa"]})
    assert recipe.stage_names(measured)[-3:] == ["evaluate", "lm_eval", "publish"]
    assert recipe.check_until(measured, "lm_eval") == []
    assert "has no such stage" in recipe.check_until(config, "lm_eval")[0]


def test_finished_model_is_named_after_the_last_stage_that_made_one():
    assert recipe.policy_label(PipelineConfig()) == "PPO"
    assert recipe.policy_label(PipelineConfig(stages=("sft", "reward"))) == "SFT"
    assert recipe.display_name("ppo-2") == "PPO, round 2"
    assert recipe.display_name("reward-2") == "reward model 2"


def test_members_of_an_ensemble_have_roles_of_their_own():
    config = PipelineConfig(reward={"members": 2})
    roles = [step.result_role for step in recipe.steps(config)]
    assert roles == ["model", "dataset", "reward_model", "reward_model-2", "model"]
    assert recipe.reward_models(config) == 2
    assert recipe.reward_models(PipelineConfig(reward_model=("a", "b", "c"), stages=("ppo",))) == 3
    assert recipe.check_until(config, "reward") == recipe.check_until(config, "reward-2") == []
