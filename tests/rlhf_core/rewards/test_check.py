"""What is said about rewards before anything is started."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from rlhf_core.jobs import DataSettings
from rlhf_core.jobs.reward_services import CodeReward, HttpReward, JudgeReward
from rlhf_core.jobs.rewards import (
    AnswerReward,
    LengthReward,
    ModelReward,
    PythonReward,
    ReasoningGymReward,
    SentimentReward,
)
from rlhf_core.rewards import check_rewards
from tests.rlhf_core.rewards.helpers import HERE


def test_sound_rewards_have_no_problems():
    prompts = DataSettings(source="a.jsonl", columns={"answer": "solution"})
    rewards = [
        ModelReward(), LengthReward(target=5, width=2, weight=-1), AnswerReward(),
        SentimentReward(), PythonReward(function=f"{HERE}:brevity"),
    ]  # fmt: skip
    assert check_rewards(rewards, prompts) == []


def test_rewards_without_any_weight_are_a_problem():
    assert "rewards is empty" in check_rewards([])[0]
    assert "weight 0" in check_rewards([ModelReward(weight=0), SentimentReward(weight=0)])[0]


def test_missing_answers_are_seen_in_the_settings_of_the_prompts():
    prompts = DataSettings(source="a.jsonl")
    [problem] = check_rewards([ModelReward(), AnswerReward()], prompts)
    assert problem.startswith("rewards.1 (answer): the prompts (a.jsonl) have no answers; name")
    assert check_rewards([AnswerReward()]) == []  # nothing known about the prompts
    assert check_rewards([AnswerReward(without_answer=0)], prompts) == []
    gym = DataSettings(source="reasoning-gym:leg_counting")
    assert check_rewards([AnswerReward()], gym) == []


def test_missing_packages_are_named_with_the_command(monkeypatch):
    find = importlib.util.find_spec
    gone = {"reasoning_gym", "vaderSentiment"}

    def without(name, *rest):
        return None if name in gone else find(name, *rest)

    monkeypatch.setattr("rlhf_core.rewards.reasoning.find_spec", without)
    monkeypatch.setattr("rlhf_core.rewards.check.find_spec", without)
    prompts = DataSettings(source="a.jsonl")
    gym, where, vader = check_rewards([ReasoningGymReward(), SentimentReward()], prompts)
    assert 'pip install "rlhf-pipeline[reasoning]"' in gym
    assert "not from reasoning-gym; set data.prompts.source" in where
    assert "pip install vaderSentiment" in vader


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("def f(**batch): ...", "f", None),
        ("def f(**batch): ...", "g", "has no attribute 'g'; correct the function's name"),
        ("1 / 0", "f", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("import sys; sys.exit('bye')", "f", "ended with 'bye'"),
    ],
)
def test_function_is_imported_elsewhere(tmp_path, monkeypatch, code, name, message):
    (tmp_path / "own_rewards.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problems = check_rewards([PythonReward(function=f"own_rewards:{name}")])
    assert "own_rewards" not in sys.modules
    if message is None:
        assert problems == []
    else:
        assert len(problems) == 1 and problems[0].startswith("rewards.0 (python): ")
        assert re.search(message, problems[0]), problems


def test_services_need_their_key_and_their_columns(monkeypatch):
    monkeypatch.delenv("SERVICE_KEY", raising=False)
    rubric = "{prompt} {reply} {answer} [[5]]"
    rewards = [
        HttpReward(url="http://host/score", key_variable="SERVICE_KEY"),
        CodeReward(url="http://host"),
        JudgeReward(url="http://host/v1", model="m", template=rubric),
    ]
    key, code, judge = check_rewards(rewards, DataSettings(source="a.jsonl"))
    assert key.startswith("rewards.0 (http): The reward http's key comes from the environment")
    assert code.startswith("rewards.1 (code): the prompts (a.jsonl) have no tests; name")
    assert judge.startswith("rewards.2 (judge): its template has {answer}, and the prompts")
    monkeypatch.setenv("SERVICE_KEY", "secret-of-it")
    given = DataSettings(source="a.jsonl", columns={"answer": "solution"})
    assert check_rewards(rewards, given) == []
