"""How often stages wait for the GPU, as a function of how much they do.

Each number is the difference between two runs that differ in one thing alone: rows of a step,
tokens of a rollout, rows of a micro-batch. What a stage does once cancels out.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.gpu import syncs

LEARNS = ("sft", "dpo", "reward")


def measure(runner: Any, inputs: Any) -> dict[str, dict[str, Any]]:
    """Name -> {"per": what is counted, "waits": how often the host waits for one, "lines"}."""
    found = {}
    for algorithm in LEARNS:
        found[f"{algorithm}, forward pass"] = _per_pass(runner, inputs, algorithm)
    found["rollout, token"] = _per_token(runner, inputs, ends=False)
    found["rollout in which replies end, token"] = _per_token(runner, inputs, ends=True)
    for name, (algorithm, function, sizes) in SCORING.items():
        found[f"{name}, row"] = _per_row(runner, inputs, algorithm, function, sizes)
    return found


# Functions in which rows are scored; a stage that calls each; what doubles its rows.
SCORING: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "scores of the reward model": (
        "label", "rlhf_core.stages.label.score_sequences", [{"max_prompts": 4}, {"max_prompts": 8}],
    ),
    "rewards and KL of an evaluation": (
        "evaluate", "rlhf_core.evaluation.measure.score_replies",
        [{"max_prompts": 3}, {"max_prompts": 6}],
    ),
    "log-probabilities of pairs": (
        "dpo", "rlhf_core.training.preference.response_logps",
        [{"batch_size": 4, "max_steps": 1}, {"batch_size": 8, "max_steps": 1}],
    ),
    "first pass over a rollout": (
        "ppo", "rlhf_core.training.online.experience.run_models",
        [{"batch_size": 4, "steps": 1}, {"batch_size": 8, "steps": 1}],
    ),
    "held-out margins": (
        "reward", "rlhf_core.algorithms.reward.heldout_margins",
        [{"data": "preference, half", "max_steps": 1}, {"max_steps": 1}],
    ),
    "held-out loss": (
        "sft", "rlhf_core.algorithms.sft.heldout_loss",
        [{"data": "sft, half", "max_steps": 1}, {"max_steps": 1}],
    ),
}  # fmt: skip


def _per_pass(runner: Any, inputs: Any, algorithm: str) -> dict[str, Any]:
    """A step of 8 rows against one of 16, two in a micro-batch: for each forward pass more, with
    its backward pass where it has one."""
    from rlhf_core.nn.modules import Policy, ScalarModel
    from tests.gpu.cases import Case, job

    passes: list[Any] = []
    counts, tables = [], []
    with _counting(Policy, "forward", passes), _counting(ScalarModel, "forward", passes):
        for rows in (8, 16):
            passes.clear()
            made = job(
                Case(algorithm, precision="bf16"), inputs, "cuda", batch_size=rows, max_steps=1,
                resources={"micro_batch_size": 2},
            )  # fmt: skip
            with syncs.counted() as found:
                runner(made)
            counts.append(len(passes))
            tables.append(found)
    return _difference(tables, counts)


def _counting(owner: Any, name: str, calls: list[Any]) -> contextlib.AbstractContextManager[None]:
    whole = getattr(owner, name)

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return whole(*args, **options)

    return _replaced(owner, name, counting)


def _per_token(runner: Any, inputs: Any, *, ends: bool) -> dict[str, Any]:
    """A rollout of 8 tokens against one of 16."""
    from rlhf_core.models.loading import load_causal_lm
    from rlhf_core.rollout.generate import generate

    model = load_causal_lm(runner.store.fetch(inputs.models["llama"])).to("cuda")
    prompts = [list(range(5, 9 + i % 3)) for i in range(12)]
    # with a fifth of the vocabulary as ends of turn, replies end at most steps
    stop = set(range(0, 960, 5)) if ends else {959}
    counts, tables = [], []
    for tokens in (1, 8, 16):  # the first for what is tried out once
        with syncs.counted() as found:
            rollout = generate(
                model, prompts, max_new_tokens=tokens, eos_ids=stop, pad_id=0,
                row_seeds=range(len(prompts)),
            )  # fmt: skip
        lengths = rollout.response_mask.sum(dim=1)
        counts.append(int(lengths.max()))
        tables.append(found)
    assert not ends or len(set(lengths.tolist())) > 3, "replies do not end at different steps"
    return _difference(tables[1:], counts[1:])


class _Seen(BaseException):
    """A stage has called what is measured."""


def _per_row(
    runner: Any, inputs: Any, algorithm: str, function: str, sizes: list[dict[str, Any]]
) -> dict[str, Any]:
    """A stage's first call of a function with few rows, and with twice as many in one pass; the
    stage goes no further."""
    import importlib

    from tests.gpu.cases import Case, job

    module_name, _, name = function.rpartition(".")
    module = importlib.import_module(module_name)
    whole = getattr(module, name)
    first: list[Counter[syncs.Key]] = []

    def counted(*args: Any, **options: Any) -> Any:
        with syncs.counted() as found:
            whole(*args, **options)
        first.append(found)
        raise _Seen

    tables = []
    with _replaced(module, name, counted):
        for changes in sizes:
            first.clear()
            data = {"data": inputs.data[changes["data"]]} if "data" in changes else {}
            made = job(
                Case(algorithm, precision="bf16"), inputs, "cuda",
                resources={"micro_batch_size": 256}, **(changes | data),
            )  # fmt: skip
            with contextlib.suppress(_Seen):
                runner(made)
            assert first, f"{algorithm} no longer calls {function}"
            tables += first
    return _difference(tables, [1, 2])


def _difference(tables: list[Counter[syncs.Key]], counts: list[int]) -> dict[str, Any]:
    """How often the host waits for one more, and at which lines."""
    few, many = tables
    more = counts[1] - counts[0]
    assert more > 0, counts
    lines = {key: many[key] - few[key] for key in many | few if many[key] != few[key]}
    return {
        "waits": sum(lines.values()) / more,
        "lines": [f"{n / more:+.2f} {where} {kind}" for (where, kind), n in sorted(lines.items())],
        "of": counts,
    }


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
