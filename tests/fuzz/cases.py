"""How many cases each property is tried on, and the one way to try them.

`make test` tries the cases of PLAN, the same ones each time. `make fuzz` sets RLHF_FUZZ to a factor
and takes another seed each time; what it finds is printed with that seed, shrunk to a small case.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

PLAN = {
    "rows": 300,
    "files": 200,
    "damaged files": 250,
    "parquet types": 100,
    "configurations": 150,
    "overrides": 125,
    "yaml": 250,
    "jobs": 250,
    "manifests": 400,
    "paths": 200,
    "weight headers": 350,
    "model folders": 200,
    "rewards": 400,
}
FACTOR = float(os.environ.get("RLHF_FUZZ", "1"))
SEED = int(os.environ.get("RLHF_FUZZ_SEED", "0"))


def try_cases(name: str, cases: SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Call `check` with as many different cases as the plan has for this name."""
    tried = 0

    @seed(SEED)
    @settings(
        max_examples=int(PLAN[name] * FACTOR),
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases)
    def attempt(case: Any) -> None:
        nonlocal tried
        tried += 1
        check(case)

    attempt()
    print(f"{tried} cases of {name}, seed {SEED}", file=sys.stderr)
    assert tried >= int(PLAN[name] * FACTOR), f"only {tried} cases: the strategy is too narrow"
