"""The examples on the page about rewards are settings, and its function can be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml
from pydantic import TypeAdapter

from rlhf_core.jobs import DataSettings, PipelineConfig
from rlhf_core.jobs.rewards import Reward
from rlhf_core.rewards import check_rewards

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "rewards.md").read_text()


def test_examples_are_settings():
    examples = re.findall(r"^```ya?ml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 6
    for text in examples:
        example = yaml.safe_load(text)
        assert PipelineConfig.model_validate(example)
        given = example.get("grpo", {}).get("rewards", [])
        rewards = TypeAdapter(list[Reward]).validate_python(given)
        if "data" in example:
            prompts = DataSettings.model_validate(example["data"]["prompts"])
            told = [p for p in check_rewards(rewards, prompts) if "is not installed" not in p]
            assert told == []


def test_table_names_every_reward():
    kinds = {get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(Reward)}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) - {"type"} == kinds


def test_function_on_the_page_works():
    code = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code[1], names)
    given = {"prompts": [[], []], "rows": [{}, {}], "finished": [True, True]}
    assert names["brevity"](replies=["", "a b c"], **given) == [1.0, 0.25]
