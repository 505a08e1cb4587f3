"""How much is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz.cases import PLAN, try_cases


def test_plan_has_at_least_2000_cases_and_each_part_is_tried() -> None:
    assert sum(PLAN.values()) >= 2000
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r'try_cases\(\s*"([^"]+)"', text)) >= set(PLAN)


def test_cases_that_were_not_tried_are_noticed() -> None:
    with pytest.raises(AssertionError, match="too narrow"):
        try_cases("rows", st.booleans(), lambda case: None)
    with pytest.raises(ZeroDivisionError):
        try_cases("rows", st.integers(0, 999), lambda case: print(1 // max(0, 50 - case)))
