"""How much is tried."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.fuzz.cases import PLAN, try_cases
from tests.fuzz.configs import settings_of


def test_plan_has_at_least_2000_cases_and_each_part_is_tried() -> None:
    assert sum(PLAN.values()) >= 2000
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r'try_cases\(\s*"([^"]+)"', text)) >= set(PLAN)


def test_cases_that_were_not_tried_are_noticed() -> None:
    with pytest.raises(AssertionError, match="too narrow"):
        try_cases("rows", st.booleans(), lambda case: None)
    with pytest.raises(ZeroDivisionError):
        try_cases("rows", st.integers(0, 999), lambda case: print(1 // max(0, 50 - case)))


def test_settings_of_a_section_without_defaults_are_made_whole() -> None:
    class Pair(BaseModel):
        left: int
        right: bool

    made: list[dict[str, Any]] = []
    try_cases("parquet types", settings_of(Pair), made.append)
    assert all(set(value) == {"left", "right"} for value in made)
