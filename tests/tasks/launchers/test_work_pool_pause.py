"""How often a pipeline asks the server for its stage's state."""

from __future__ import annotations

import pytest

from tasks.launchers.work_pool import pause


@pytest.mark.parametrize(
    ("waited", "answered", "seconds"),
    [(10, 0.02, 0.5), (100, 0.02, 2.0), (10, 0.3, 3.0), (100, 0.3, 3.0), (100, 60.0, 20.0)],
)
def test_slow_server_is_asked_less_often(waited, answered, seconds):
    assert pause(waited, answered) == pytest.approx(seconds)
