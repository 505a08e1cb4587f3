"""reasoning-gym's tasks: prompts made from them, and replies scored by their verifiers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.sources import reasoning
from rlhf_core.data.sources.kind import source_kind
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.jobs import DataSettings
from rlhf_core.jobs.rewards import ReasoningGymReward
from rlhf_core.rewards import Rules
from rlhf_core.rewards.reasoning import Verifier
from tests.rlhf_core.data.helpers import prepared


def rows(source: str) -> list[dict]:
    return [raw.data for raw in open_rows(DataSettings(source=source))]


def row_of(data: dict) -> dict:
    return {"row": 3, "extra": json.dumps(data["extra"])}


def test_source_gives_questions_with_answers_and_entries(gym):
    source = "reasoning-gym:say?size=2&seed=7"
    first, second = rows(source)
    assert (first["prompt"], first["answer"]) == ("Say 700.", "700")
    assert second["extra"] == {
        "reasoning_gym": {
            "task": "say",
            "options": {},
            "entry": {"question": "Say 701.", "answer": "701", "metadata": {"pair": [1, 2]}},
        }
    }
    assert source_kind(source) == "reasoning"
    assert fingerprint(DataSettings(source=source)) == f"{source}@9.9"
    assert len(rows("reasoning-gym:say")) == reasoning.DEFAULT_SIZE
    assert rows("reasoning-gym:say?size=1&fixed=5")[0]["extra"]["reasoning_gym"]["options"] == {
        "fixed": 5
    }


def test_source_becomes_a_data_set_that_the_reward_reads(gym, tmp_path):
    source = "reasoning-gym:say?size=3"
    assert check_source(DataSettings(source=source), "prompts") == []
    out = prepared(tmp_path / "prompts", source, "prompts", max_length=512)
    assert [(row["answer"], row["reference"]) for row in out] == [(str(n),) * 2 for n in range(3)]
    rules = Rules([ReasoningGymReward()], seed=0)
    replies = ["<answer> 0 </answer>", "<answer>2</answer>", "2"]
    assert rules.score([[]] * 3, replies, out, [True] * 3) == [[1.0, 0.05, 0.0]]
    assert len(prepared(tmp_path / "sft", source, "sft", max_length=512)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("say?size=0", "size is '0'; expected an integer from 1"),
        ("say?seed=x", "seed is 'x'; expected an integer from 0"),
        ("say?size", "write reasoning-gym:TASK\\?size=500&seed=0"),
        ("sing", "has no task 'sing'; the tasks are anything, prefix, say, tuples"),
        ("say?fixed=-1", "fixed must be positive; correct the options"),
        ("say?colour=1", "unexpected keyword argument 'colour'; correct the options"),
        ("anything", "row 1: the task's verifier gives the senseless reply 'qwx zvk qwx'"),
        ("prefix?fixed=0.25", "gives the reply '0' to a question with the answer 0.25 full marks"),
        ("tuples", "row 1: the task's verifier scores its own answer 1, but 0 after the entry"),
    ],
)
def test_source_that_cannot_be_made_is_refused(gym, source, message):
    with pytest.raises(DataError, match=message):
        rows(f"reasoning-gym:{source}")


def test_task_that_follows_pythons_hashes_is_made_without_their_salt(gym):
    code, plain = "print(hash('word'))", {**os.environ, "PYTHONHASHSEED": "0"}
    unsalted = subprocess.check_output([sys.executable, "-c", code], env=plain, text=True).strip()
    made = rows("reasoning-gym:word_ladder?size=2&seed=1")
    assert [row["answer"] for row in made] == [f"{unsalted} 100", f"{unsalted} 101"]
    with pytest.raises(DataError, match="unexpected keyword argument 'colour'; correct"):
        rows("reasoning-gym:word_ladder?colour=1")


def test_process_that_makes_rows_ends_with_the_reading_and_is_named_when_it_dies(gym):
    before = {child.pid for child in psutil.Process().children()}
    made = open_rows(DataSettings(source="reasoning-gym:word_ladder?size=100000"))
    next(made)
    assert len({child.pid for child in psutil.Process().children()} - before) == 1
    made.close()
    assert not {child.pid for child in psutil.Process().children()} - before
    with (gym / "reasoning_gym" / "__init__.py").open("a") as package:
        package.write("os._exit(3)\n")
    with pytest.raises(DataError, match="ended with status 3; its output is above"):
        rows("reasoning-gym:word_ladder?size=1")


def test_verifier_of_anything_is_refused_before_a_run_starts(gym):
    [problem] = check_source(DataSettings(source="reasoning-gym:anything"), "prompts")
    assert "full marks (1); use another task" in problem


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("say?seed=0", "say?seed=1", "share up to 499 of 500 questions"),
        ("say?seed=1", "say", "seeds 0 and 1 of task say share up to 499 of 500 questions"),
        ("say?size=10&seed=5", "say?size=4&seed=14", "share up to 1 of 4 questions"),
        ("say?size=10&seed=5", "say?size=3&seed=6", "share up to 3 of 3 questions"),
        ("say?size=10&seed=5", "say?size=4&seed=15", ""),
        ("say?size=10&seed=5", "say?size=4&seed=5", ""),
        ("say?seed=0", "say?seed=1&fixed=5", ""),
        ("say?seed=0", "tuples?seed=1", ""),
    ],
)
def test_near_seeds_share_the_questions_that_are_told(first, second, shared):
    first, second = f"reasoning-gym:{first}", f"reasoning-gym:{second}"
    found = reasoning.near_seeds(first, second)
    assert shared in found and bool(shared) == bool(found)


def test_verifier_that_hangs_or_dies_gives_0_and_is_counted(gym):
    [data] = rows("reasoning-gym:say?size=1&fixed=5")
    rules = Rules([ReasoningGymReward(pattern=None, time_limit=5.0)], seed=0)
    replies = ["5", "hang", "5", "die", "raise", "two", "5", "你好 😀", ""]
    row = row_of(data)
    started = time.monotonic()
    [scores] = rules.score([[]] * 9, replies, [row] * 9, [True] * 9)
    assert time.monotonic() - started < 60
    assert scores == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.05, 0.05]
    assert rules.failures == {"verifier_timeout": 1, "verifier_error": 3}


def test_prompt_of_another_source_is_an_error_or_a_set_score(gym):
    for extra in ("", "[", "5", '{"reasoning_gym": 5}'):
        with pytest.raises(DataError, match="row 3 is not one"):
            Rules([ReasoningGymReward()], 0).score([[]], ["5"], [{"row": 3, "extra": extra}], [1])
    kinder = Rules([ReasoningGymReward(without_answer=0.5)], 0)
    assert kinder.score([[]], ["5"], [{}], [True]) == [[0.5]]


def test_task_that_is_not_there_any_more_is_a_config_error(gym):
    verifier = Verifier(0)
    with pytest.raises(ConfigError, match="task sing: Dataset 'sing' not registered"):
        verifier.score({"task": "sing", "options": {}, "entry": {}, "answer": "5"}, 30)
    verifier.close()


def test_verifier_ends_with_its_parent(gym, tmp_path):
    code = (
        "import os, signal\n"
        "from rlhf_core.rewards.reasoning import Verifier\n"
        "v = Verifier(0)\n"
        "e = {'answer': '5', 'metadata': {}}\n"
        "r = {'task': 'say', 'options': {}, 'entry': e, 'answer': '5'}\n"
        "assert v.score(r, 30) == (1.0, '')\n"
        "print(v._process.pid, flush=True)\n"
        "v.score({**r, 'answer': 'hang'}, 600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


def test_package_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("rlhf_core.rewards.reasoning.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "rlhf-pipeline\[reasoning\]"'):
        Rules([ReasoningGymReward()], seed=0)


def test_source_whose_package_is_missing_is_refused_with_the_command(monkeypatch):
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    with pytest.raises(DataError, match=r'pip install "rlhf-pipeline\[reasoning\]"'):
        rows("reasoning-gym:leg_counting")


@pytest.mark.extras
def test_real_verifier_of_anything_is_refused_and_real_near_seeds_overlap():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym; run: make test-extras")
    with pytest.raises(DataError, match="gives the senseless reply"):
        rows("reasoning-gym:game_of_life_halting?size=1")
    with pytest.raises(DataError, match="gives the reply '0' to a question with the answer 0"):
        rows("reasoning-gym:coin_flip?size=9")
    first, near, far = (
        {row["prompt"] for row in rows(f"reasoning-gym:basic_arithmetic?size=50&seed={seed}")}
        for seed in (0, 1, 50)
    )
    assert (len(first & near), len(first & far)) == (49, 0)


@pytest.mark.extras
@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic", "countdown", "word_sorting"])
def test_real_task_scores_its_own_answers(task):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym; run: make test-extras")
    made = rows(f"reasoning-gym:{task}?size=4&seed=1")
    rules = Rules([ReasoningGymReward()], seed=0)
    replies = [f"Let me see. <answer>{data['answer']}</answer>" for data in made]
    given = [row_of(data) for data in made]
    assert rules.score([[]] * 4, replies, given, [True] * 4) == [[1.0] * 4]
    [wrong] = rules.score([[]] * 4, ["<answer>no</answer>"] * 4, given, [True] * 4)
    assert all(score < 0.5 for score in wrong)
