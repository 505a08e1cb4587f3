"""Ranks with a made-up rule, and ranks that are told to stop: `main([PLAN.json])` under torchrun.

The plan is a list of {"job", "store", "folder", "rule": bool, "stop_after": step or null,
"kill_after": step after whose checkpoint a sampler is killed, or null,
"stale_after": rollouts or null, after which an engine gets no new weights, "gather_share": share of
the free memory that fsdp2 may take to gather a policy for a rollout}. What a stage gave up
with is written into its folder as said.txt.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Literal

import psutil

from rlhf_core.errors import RLHFError
from rlhf_core.jobs import parse_job
from rlhf_core.jobs.base import Settings
from rlhf_core.rollout import sharded
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.runtime.rank import MODEL_MODULES, run_job, silence_libraries
from rlhf_core.runtime.stopping import stop
from rlhf_core.store import open_store
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.online import models as online


class LettersReward(Settings):
    """Share of a reply's characters that are ASCII letters."""

    type: Literal["letters"] = "letters"
    weight: float = 0.5


class Letters:
    """A rule that sees what rules see."""

    def __init__(self, rewards, seed) -> None:
        assert [type(r) for r in rewards] == [LettersReward]
        self.names = ["letters"]
        self.weights = [rewards[0].weight]
        self.failures = Counter()

    def score(self, prompts, replies, rows, finished, tokens):
        assert len(prompts) == len(replies) == len(rows) == len(finished) == len(tokens)
        for prompt, row in zip(prompts, rows, strict=True):
            assert prompt == json.loads(row["prompt"])
            assert prompt[-1]["role"] == "user"
        self.failures["seen"] += len(replies)
        return [[sum(c.isascii() and c.isalpha() for c in r) / max(1, len(r)) for r in replies]]


GATHER_SHARE = sharded.GATHER_SHARE
AFTER_STEP = Checkpointer.after_step


def stopping_after(last):
    """A way through `after_step` on which the job is told to stop once."""

    def after_step(self, step, total, counters=None):
        stop.requested = step == last
        try:
            AFTER_STEP(self, step, total, counters)
        finally:
            stop.requested = False

    return after_step


def killing_after(last, after_step):
    """A way through `after_step` on which a sampler of this process is killed once."""

    def killing(self, step, total, counters=None):
        after_step(self, step, total, counters)
        if step == last:
            self._uploads.wait()
            children = psutil.Process().children()
            [*_, sampler] = [p for p in children if "sampler_process" in " ".join(p.cmdline())]
            sampler.kill()

    return killing


UPDATE = VllmEngine.update


def forgetting_after(count):
    """A way through `update` that hands over no weights after so many rollouts."""
    seen = []

    def update(self, weights):
        seen.append(1)
        if count is None or len(seen) <= count:
            UPDATE(self, weights)

    return update


def preload(files: list[str]) -> None:
    for module in MODEL_MODULES:
        importlib.import_module(module)


def main(files: list[str]) -> None:
    silence_libraries()
    rules = online.Rules
    for entry in json.loads(Path(files[0]).read_text()):
        job, folder = parse_job(json.dumps(entry["job"])), Path(entry["folder"])
        online.Rules = rules
        if entry.get("rule"):
            online.Rules = Letters
            job = job.model_copy(update={"rewards": (LettersReward(),), "reward_model": None})

        sharded.GATHER_SHARE = entry.get("gather_share", GATHER_SHARE)
        Checkpointer.after_step = killing_after(
            entry.get("kill_after"), stopping_after(entry.get("stop_after"))
        )
        VllmEngine.update = forgetting_after(entry.get("stale_after"))
        try:
            run_job(job, open_store(entry["store"]), folder)
        except RLHFError as error:
            (folder / "said.txt").write_text(str(error))
