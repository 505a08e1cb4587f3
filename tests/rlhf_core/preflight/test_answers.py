"""Reference answers are read before a run, as the rule `answer` will read them."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.jobs.rewards import AnswerReward
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.answers import check_answers
from rlhf_core.rewards import Rules
from rlhf_core.rewards.answer import is_readable
from rlhf_core.rewards.references import read_references


def checked(folder: Path, answers: list[object], rule: str) -> tuple[list[str], list[str]]:
    rows = ({"prompt": f"Question {i}", "solution": a} for i, a in enumerate(answers))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.prompts.source={folder / 'a.jsonl'}", f"grpo.rewards=[{rule}]",
                "data.prompts.columns={answer: solution}"]  # fmt: skip
    return check_answers(build_config("grpo-rules", settings))


NUMERIC = "{type: answer, match: numeric}"


def test_few_unreadable_answers_are_told_with_count_and_examples(tmp_path):
    problems, [remark] = checked(tmp_path, [5, "5 km", "5!", "1,234"], NUMERIC)
    assert problems == []
    assert remark.startswith(
        "grpo.rewards.0 (answer): 1 of 4 reference answers cannot be read as a value"
    )
    assert "row 3 has '5!'" in remark


def test_run_with_mostly_unreadable_answers_is_refused(tmp_path):
    [problem], remarks = checked(tmp_path, ["5!", "x^2", "1 0\n0 1", "7"], NUMERIC)
    assert remarks == [] and "3 of 4 reference answers cannot be read" in problem
    assert checked(tmp_path, ["5!", "x^2", "7", "8"], NUMERIC)[0] == []  # half


def test_missing_answers_are_refused_unless_the_rule_has_a_reward_for_them(tmp_path):
    answers = [5, None, "none"]
    [problem], _ = checked(tmp_path, answers, NUMERIC)
    assert "2 of 3 rows have no answer, which the rule needs (a number" in problem
    assert "row 2 has '', row 3 has 'none'" in problem
    [exact], _ = checked(tmp_path, answers, "{type: answer}")
    assert "1 of 3 rows have no answer" in exact
    without = "{type: answer, match: numeric, without_answer: 0}"
    assert checked(tmp_path, answers, without) == ([], [])


def test_pattern_is_applied_as_in_training(tmp_path):
    rule = r"{type: answer, match: numeric, pattern: '####\s*(.*)'}"
    assert checked(tmp_path, ["2^10 is more.\n#### 5", "a!\n#### 7"], rule) == ([], [])
    assert len(checked(tmp_path, ["5\n#### x^2"], rule)[0]) == 1


def test_runs_without_the_rule_read_nothing(tmp_path):
    settings = ["data.prompts.source=/nowhere.jsonl", "grpo.rewards=[{type: must_end}]"]
    assert check_answers(build_config("grpo-rules", settings)) == ([], [])


def test_readable_answers_are_those_that_other_words_can_equal():
    readable = {"5": True, "x > 5": True, "5 km": True, "5!": False, "at least 5": False,
                "1 0\n0 1": False, "x=2, y=3": False, "(": False, "five": False}  # fmt: skip
    assert {answer: is_readable(answer) for answer in readable} == readable


def test_rules_and_check_agree_on_missing_answers():
    rule = AnswerReward(match="numeric", without_answer=0.25)
    answers = ["", "none", "5", "5!"]
    scores = Rules([rule], seed=0).score(
        [[]] * 4, answers, [{"answer": a} for a in answers], [True] * 4
    )
    assert scores == [[0.25, 0.25, 1.0, 1.0]]
    found = read_references(rule, enumerate(answers, 1))
    assert (found.missing, found.unreadable) == (2, 1)
