"""The order of stages in a queue, and the time that one waits."""

import pytest

from tasks.launchers.queue import Waiting, queue_name, wait_seconds
from tasks.launchers.waits import ordinal


def test_ordinals_are_english():
    numbers = (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)
    said = "1st 2nd 3rd 4th 11th 12th 13th 21st 102nd 111th"
    assert " ".join(map(ordinal, numbers)) == said


def test_priority_and_share_choose_the_queue():
    chosen = [queue_name(p, f) for p in ("high", "normal", "low") for f in (True, False)]
    assert chosen == ["high", "high", "default", "further", "low", "low"]


@pytest.mark.parametrize(
    ("running", "ahead", "slots", "seconds"),
    [
        ([], [], 1, 0),
        ([30], [], 1, 30),
        ([30], [], 2, 0),
        ([30, 50], [], 2, 30),
        ([30], [100, 10], 1, 140),
        ([30, 50], [100], 2, 50),  # the one ahead takes the slot that is free after 30
        ([30, 50], [100, 100], 2, 130),
        ([10, 20, 70], [], 2, 20),  # more run than there are slots: the limit was lowered
    ],
)
def test_wait_is_until_a_slot_is_free_for_the_next_one(running, ahead, slots, seconds):
    assert wait_seconds(running, ahead, slots) == seconds


def test_place_is_said_in_one_line():
    assert str(Waiting(2, 5, 725)) == "2nd of 5, about 12 min"
    assert str(Waiting(2, 5, 6300)) == "2nd of 5, about 1 h 45 min"
    assert str(Waiting(1, 1, 12)) == "1st of 1, less than a minute"
    assert str(Waiting(3, 3, None)) == "3rd of 3"
