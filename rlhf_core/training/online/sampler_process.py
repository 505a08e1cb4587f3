"""A process that samples for the training ranks: `python -m ...sampler_process DESCRIPTOR`.

DESCRIPTOR is a socket to rank 0 (`samplers.Samplers`). Messages are JSON. The first one is a
`Setup`, answered by {"ready"} when the policy is loaded. Each further one is a request, see
`Sampler.answer`. A failure is answered by {"failed": category, "message"} and ends the process, as
does the end of rank 0. It has no state but the weights that it got last: whoever asks keeps the
replies.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from rlhf_core.jobs import OnlineJob, Precision, VllmRollout, parse_job
from rlhf_core.jobs import Strategy as Kind
from rlhf_core.model_files.remote_code import allow
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.models.saving import stop_tokens
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.sharded import assign
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.rollout.generate import Rollout, generate
from rlhf_core.rollout.handover import read
from rlhf_core.rollout.sampling import row_uniforms
from rlhf_core.rollout.vllm_engine import VllmEngine
from rlhf_core.runtime.rank import (
    classify,
    fast_paths_as_set,
    prefer_as_oom_victim,
    show_own_warnings,
    silence_libraries,
)
from rlhf_core.system.processes import name_process
from rlhf_core.system.secrets import redact
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.policy import frozen_storage, new_policy
from rlhf_core.training.strategy import HALF, Strategy

SHOW_STACK = signal.SIGUSR1  # writes the Python stack of every thread to stderr
MODULE = __name__ if __name__ != "__main__" else "rlhf_core.training.online.sampler_process"


class Setup(NamedTuple):
    """What a sampler is told first."""

    job: str  # JSON
    source: str  # folder of the policy's start
    number: int  # among the samplers
    kind: Kind  # the trainer's strategy
    precision: Precision  # in which the trainer computes
    threads: int  # CPU threads
    longest: int  # tokens of a prompt and its reply
    together: int  # replies sampled at once


class Row(NamedTuple):
    """A reply to begin or to continue."""

    index: int  # by which its tokens come back
    ids: list[int]  # the prompt and the tokens that there are
    seed: int  # of the row
    start: int  # tokens of the reply that there are
    count: int  # how many more there may be


class Sampler:
    """The built-in loop with a policy of its own."""

    def __init__(self, setup: Setup, job: OnlineJob, source: Path, strategy: Strategy) -> None:
        self.job, self.strategy = job, strategy
        self.stop = stop_tokens(source)
        policy = new_policy(job, load_causal_lm(source, *frozen_storage(job, strategy)))
        # In half precision before it is moved: a device that holds it so may not hold it in fp32.
        self.policy = as_trained(policy, setup).to(strategy.device)

    def answer(self, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        """Sample, and send {"replies": [[index, ids, logprobs, finished], ...]}, some at a time and
        as soon as they end. Of what is sent for one index the last counts.

        Args:
            request: "weights", the path of a `Handover`, and "rows".
        """
        self.update(Path(request["weights"]))
        by_count: dict[int, list[Row]] = {}
        for given in request["rows"]:
            row = Row(*given)
            by_count.setdefault(row.count, []).append(row)
        for count, rows in sorted(by_count.items()):
            self._sample_and_send(rows, count, send)

    def _sample_and_send(
        self, rows: list[Row], count: int, send: Callable[[dict[str, Any]], None]
    ) -> None:
        sent: dict[int, FinishedReply] = {}

        def hand_out(replies: list[FinishedReply]) -> None:
            sent.update({reply.row: reply for reply in replies})
            send({"replies": [reply._replace(row=rows[reply.row].index) for reply in replies]})

        whole = replies_of(self.sample(rows, count, hand_out).cpu())
        # What a fast path that failed has handed out is sampled again.
        hand_out([reply for reply in whole if sent.get(reply.row) != reply])

    def update(self, weights: Path) -> None:
        """Take new weights."""
        assign(self.policy, dict(read(weights)))

    def sample(self, rows: list[Row], count: int, on_finished: OnFinished) -> Rollout:
        """Up to `count` tokens for each row, by its own random numbers from where it stands."""
        uniforms = torch.stack(
            [row_uniforms([row.seed], row.start + count)[0, row.start :] for row in rows]
        )  # (b,T)
        with self.strategy.autocast():
            return generate(
                self.policy.model, [row.ids for row in rows], max_new_tokens=count,
                temperature=self.job.temperature, eos_ids=self.stop, pad_id=0,
                uniforms=uniforms, on_finished=on_finished,
            )  # fmt: skip


class VllmSampler(Sampler):
    """vLLM, which gets whole weights."""

    def __init__(self, setup: Setup, job: OnlineJob, source: Path, strategy: Strategy) -> None:
        assert isinstance(job.rollout, VllmRollout)
        self.job, self.stop = job, stop_tokens(source)
        self.engine = VllmEngine(
            source, job.rollout, precision=setup.precision, device=strategy.device,
            longest=setup.longest, together=setup.together,
        )  # fmt: skip

    def update(self, weights: Path) -> None:
        self.engine.read(weights)

    def sample(self, rows: list[Row], count: int, on_finished: OnFinished) -> Rollout:
        # vLLM draws from the beginning of a seed's numbers: each segment has a seed of its own.
        seeds = [row.seed if row.start == 0 else derive_seed(row.seed, row.start) for row in rows]
        return self.engine.generate(
            [row.ids for row in rows], max_new_tokens=count, eos_ids=self.stop, pad_id=0,
            temperature=self.job.temperature, row_seeds=seeds, on_finished=on_finished,
        )  # fmt: skip


def as_trained(policy: Policy, setup: Setup) -> Policy:
    """The policy in the types in which the trainer's passes have it."""
    half = HALF.get(setup.precision)
    if setup.kind == "ddp" or half is None:
        return policy
    if setup.kind == "fsdp2":  # it gathers parameters in half precision, and leaves buffers
        for param in policy.parameters():
            param.data = param.data.to(half) if param.is_floating_point() else param.data
        return policy
    return policy.to(half)


def replies_of(rollout: Rollout) -> list[FinishedReply]:
    """Every reply of a rollout on the CPU."""
    found = []
    for i, real in enumerate(rollout.response_mask):  # (T,)
        ids, logprobs = rollout.response_ids[i][real], rollout.logprobs[i][real]
        found.append(FinishedReply(i, ids.tolist(), logprobs.tolist(), bool(rollout.finished[i])))
    return found


def serve(connection: Connection) -> None:
    """Answer requests.

    Raises:
        EOFError: rank 0 has ended, or needs no more samples.
    """
    setup = Setup(**json.loads(connection.recv_bytes()))
    job, source = cast(OnlineJob, parse_job(setup.job)), Path(setup.source)
    allow(job.trust_remote_code)
    alone = {"strategy": "ddp", "nodes": 1, "ranks": 1, "threads": setup.threads}
    resources = job.resources.model_copy(update=alone)
    # Other strategies compute in half precision where ddp would not, and the trainer's rank 0 has
    # said what there is to say.
    precision = setup.precision if setup.kind == "ddp" else "fp32"
    strategy = Strategy(resources, precision, 1.0, speaks=False)
    kind = VllmSampler if isinstance(job.rollout, VllmRollout) else Sampler
    with fast_paths_as_set(job):
        sampler = kind(setup, job, source, strategy)
        send(connection, {"ready": True})
        while True:
            sampler.answer(json.loads(connection.recv_bytes()), partial(send, connection))
            send(connection, {"done": True})


def send(connection: Connection, message: dict[str, Any]) -> None:
    """One message."""
    connection.send_bytes(json.dumps(message).encode())


def main() -> None:
    """Entry point."""
    # A terminal's Ctrl-C and a scheduler's SIGTERM may reach every process. Rank 0 handles them,
    # and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    prefer_as_oom_victim()
    faulthandler.enable()
    faulthandler.register(SHOW_STACK)
    silence_libraries()
    show_own_warnings()
    name_process("rlhf sampler")
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        if (category := classify(error)) in ("internal", "oom"):
            print(redact(f"sampler:\n{traceback.format_exc()}"), file=sys.stderr, flush=True)
        send(connection, {"failed": category, "message": redact(str(error) or repr(error))})
    sys.stdout.flush()
    os._exit(0)  # threads of libraries could hold up the interpreter's own end


if __name__ == "__main__":
    main()
