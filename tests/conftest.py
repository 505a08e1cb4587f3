"""For all tests."""

import signal
from typing import Any

# A shell without job control starts what runs in its background with SIGINT ignored, and children
# inherit that: the tests that press Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The longest files, in the order in which `make test` hands them out: those that mostly wait, for
# servers and time limits, beside those whose ranks keep both cores busy.
LONGEST = (
    "flows/test_smoke.py", "store/s3/test_failures.py", "store/test_time_limits.py",
    "store/test_collect.py", "store/test_races.py", "flows/cli/test_run.py",
    "flows/test_flow.py", "tests/test_tutorial.py", "flows/test_stage_lists.py",
    "algorithms/test_online.py", "faults/test_store_away.py", "faults/test_resume.py",
    "algorithms/test_stages.py", "faults/test_stopping.py", "algorithms/test_preference.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Long files first, then those with other slow tests: none is left to one worker at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: Any) -> int:
        path = item.path.as_posix()
        place = [i for i, name in enumerate(LONGEST) if path.endswith(name)]
        return place[0] if place else len(LONGEST) + (item.path not in slow)

    items.sort(key=rank)
