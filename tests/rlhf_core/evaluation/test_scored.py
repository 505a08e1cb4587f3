"""Replies scored by rules and judges, and the numbers of an evaluation, by hand."""

import json

import pytest

from rlhf_core.data.questions import read_questions
from rlhf_core.errors import DataError
from rlhf_core.evaluation.measure import Measured
from rlhf_core.evaluation.numbers import marked, numbers, of_heldout
from rlhf_core.evaluation.rule_rewards import RuleRewards
from rlhf_core.evaluation.scored import Scorer
from rlhf_core.jobs import EvaluateJob
from rlhf_core.rollout.replies import Reply

DIGEST = "0" * 64
WORDS = ["2", "3", "no idea", "it is 2", "你好", "2\n"]
ROWS = [
    {"prompt": json.dumps([{"role": "user", "content": f"1 + {i}"}]), "answer": str(1 + i)}
    for i in (1, 2)
]


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(WORDS[i] for i in ids)


def job(**settings):
    return EvaluateJob(base=DIGEST, policy=DIGEST, prompts=DIGEST, **settings)


def measured(*ids, rewards=(), greedy=None):
    replies = [Reply([i], -0.5 * (i + 1), i != 2) for i in ids]
    return Measured(replies, list(rewards), kl=[0.1] * len(ids), greedy=greedy)


RULES = ({"type": "answer", "match": "numeric", "weight": 2.0}, {"type": "model", "weight": 0.5},
         {"type": "must_end"})  # fmt: skip


def test_reward_is_the_weighted_sum_of_the_last_online_stage():
    score = Scorer(job(rewards=RULES), ROWS, Tokenizer(), print)
    found = score(measured(0, 2, rewards=[1.0, -1.0])).columns
    assert found["answers"] == [1.0, 0.0]
    assert found["reward"] == [2.0 + 0.5 + 1.0, -0.5]
    assert found["surprise"] == [0.5, 1.5] and found["finished"] == [1.0, 0.0]
    assert score(measured(3)).columns["reward"] == [2.0 + 1.0], "greedy: the first prompts only"


def test_length_penalty_counts_the_replies_tokens():
    rules = ({"type": "length_penalty", "start": 1.0, "end": 3.0},)
    score = Scorer(job(rewards=rules), ROWS, Tokenizer(), print)
    replies = [Reply([0, 1], -1.0, True), Reply([0], -1.0, True)]
    assert score(Measured(replies, [], kl=[0.1, 0.1])).columns["reward"] == [-0.5, 0.0]


def test_rules_read_replies_as_in_training_with_the_space_around_them():
    rules = ({"type": "regex", "pattern": r"\d", "mode": "fullmatch"},)
    found = Scorer(job(rewards=rules), ROWS, Tokenizer(), print)(measured(0, 5))
    assert found.columns["reward"] == [1.0, 0.0] and found.texts == ["2", "2"]


def test_rule_without_its_answer_leaves_out_the_reward_and_says_so():
    said = []
    rules = RuleRewards(job(rewards=RULES).rewards, 0, said.append)
    replies = measured(0).replies
    assert rules.score([{**ROWS[0], "answer": ""}], ["2"], replies, []) == {"reward": []}
    assert "have no reward: The reward answer needs a number" in said[0]


def test_numbers_of_two_models_and_what_changed():
    score = Scorer(job(rewards=RULES), ROWS, Tokenizer(), print)
    models = {"base": measured(2, 2), "policy": measured(3, 1)}
    sampled = {name: score(found) for name, found in models.items()}
    greedy = {"base": score(measured(2)), "policy": score(measured(0))}
    found = numbers(job(), sampled, greedy, "base")
    assert found["models"]["base"]["answers_mean"] == 0.0
    assert found["models"]["policy"]["answers_mean"] == 1.0
    assert found["models"]["policy"]["entropy"] == (2.0 + 1.0) / 2
    assert found["models"]["base"]["refusals"] == 0.0 and found["models"]["base"]["repeated"] == 1.0
    assert found["differences"]["answers"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    assert found["differences"]["greedy_reward"]["mean"] == 3.0
    assert found["win_rate"]["reward"]["rate"] == 1.0
    assert found["sampling"] == {
        "temperature": 1.0, "max_new_tokens": 128, "seed": 0, "n": 2, "greedy": 1,
    }  # fmt: skip
    assert "entropy" not in found["greedy"]["models"]["policy"] and found["heldout"] == {}


def test_heldout_loss_is_per_token_also_that_of_each_source():
    found = Measured([], [], losses=[2.0, 3.0, 10.0], tokens=[1, 2, 5])
    of = of_heldout(found, {"a": [0, 2], "b": [1], "none": []})
    assert of["loss"] == 15 / 8 and of["sources"] == {"a": 2.0, "b": 1.5}
    assert "sources" not in of_heldout(found, {})


def test_questions_are_rates_and_their_difference():
    found, change = marked({"sft": [True, True], "policy": [True, False]}, "sft", 0)
    assert found["models"]["policy"]["rate"] == 0.5 and found["models"]["sft"]["n"] == 2
    assert change["mean"] == -0.5 and change["low"] == -1.0 and change["high"] == 0.0


def test_own_questions_have_one_answer_or_several(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": "1 + 1?", "answers": "2"}\n{"question": "A primary colour?", '
        '"answers": ["red", "blue"]}\n'
    )
    first, second = read_questions(str(path))
    assert (first.question, first.answers) == ("1 + 1?", ("2",))
    assert second.answers == ("red", "blue")


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ('{"question": "1 + 1?", "answers": []}', "expected a text, and a text or a list of texts"),
        ('{"question": "1 + 1?"}', "expected a text, and a text or a list of texts"),
        ('{"question": "", "answers": "2"}', "expected a text, and a text or a list of texts"),
        ("{", "questions.jsonl"),
        ("", "has no rows"),
    ],
)
def test_own_questions_that_cannot_be_asked_are_refused(tmp_path, row, wrong):
    path = tmp_path / "questions.jsonl"
    path.write_text(row)
    with pytest.raises(DataError, match=wrong):
        read_questions(str(path))
