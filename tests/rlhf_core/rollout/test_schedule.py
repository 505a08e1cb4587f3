"""Which weights sample which tokens, and what is kept and handed over."""

import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.rollout.handover import Handover, read
from rlhf_core.rollout.queue import QueuedReply, load_queue, save_queue
from rlhf_core.rollout.schedule import Schedule, Span


def test_rounds_are_those_of_the_table_in_the_docstring():
    schedule = Schedule(steps=5, max_staleness=2, segments=2, max_new_tokens=7)
    assert [schedule.round(version) for version in range(5)] == [
        [Span(0, 0, 7), Span(1, 0, 7), Span(2, 0, 4)],
        [Span(2, 4, 7), Span(3, 0, 4)],
        [Span(3, 4, 7), Span(4, 0, 4)],
        [Span(4, 4, 7)],
        [],
    ]
    assert [schedule.last_round(step) for step in range(5)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("steps", (1, 2, 7))
@pytest.mark.parametrize(("staleness", "segments", "tokens"), (
    (0, 1, 5), (1, 1, 5), (1, 2, 5), (3, 1, 9), (3, 2, 9), (3, 4, 9), (3, 4, 5),
))  # fmt: skip
def test_every_token_is_sampled_once_in_time_and_within_the_bound(
    steps, staleness, segments, tokens
):
    schedule = Schedule(steps, staleness, segments, tokens)
    seen = {step: [] for step in range(steps)}
    for version in range(steps + 2):
        for step, start, end in schedule.round(version):
            assert 0 <= version <= step, "the weights are there before the step is trained"
            assert step - version <= staleness
            assert version <= schedule.last_round(step) <= step
            seen[step].append((start, end))
    for spans in seen.values():
        assert spans[0][0] == 0 and spans[-1][1] == tokens
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_replies_are_begun_by_weights_as_old_as_the_bound():
    schedule = Schedule(9, 3, 2, 10)
    first = {}
    for version in range(9):
        for step, start, _ in schedule.round(version):
            if start == 0:
                first[step] = version
    assert first == {step: max(0, step - 3) for step in range(9)}


def test_queue_comes_back_as_it_was(tmp_path):
    queue = {
        3: [QueuedReply([5, 6], [-0.5, -1.25], [2, 3], True), QueuedReply()],
        4: [QueuedReply([7], [-2.0], [3], False)],
    }
    save_queue(queue, 4, tmp_path / "queue.safetensors")
    assert load_queue(tmp_path / "queue.safetensors") == (queue, 4)
    save_queue({}, 0, tmp_path / "queue.safetensors")
    assert load_queue(tmp_path / "queue.safetensors") == ({}, 0)


def test_reply_goes_on_with_newer_weights():
    reply = QueuedReply([5], [-0.5], [1], False).longer(
        QueuedReply([6, 2], [-1.0, 0.0], [2, 2], True)
    )
    assert reply == QueuedReply([5, 6, 2], [-0.5, -1.0, 0.0], [1, 2, 2], True)


@pytest.fixture
def weights():
    return {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3).t(),
        "b": torch.tensor(3.5, dtype=torch.bfloat16),
        "c": torch.empty(0, 4, dtype=torch.float16),
    }


@pytest.fixture
def handed(tmp_path, weights):
    heads = [(name, w.dtype, tuple(w.shape)) for name, w in weights.items()]
    return Handover.written(tmp_path, heads, iter(weights.values()))


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == w.dtype and torch.equal(found[name], w) for name, w in wanted.items()
    )


def test_weights_are_read_by_another_process_and_by_the_format_s_own_reader(
    tmp_path, weights, handed
):
    assert equal(dict(read(handed.path)), weights)
    handed.copy(tmp_path / "copy.safetensors")
    assert equal(load_file(tmp_path / "copy.safetensors"), weights)
    code = "import pathlib, sys; print(len(pathlib.Path(sys.argv[1]).read_bytes()))"
    said = subprocess.run([sys.executable, "-c", code, str(handed.path)], capture_output=True)
    assert int(said.stdout) == (tmp_path / "copy.safetensors").stat().st_size


def test_weights_stay_for_whoever_shares_them(weights, handed):
    shared = handed.shared()
    handed.close()
    handed.close()
    assert not handed.path.exists()
    assert equal(dict(read(shared.path)), weights)
