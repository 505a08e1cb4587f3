"""Rollouts in processes of their own (`rollout.placement: separate`), beside the training ranks.

Rank 0 starts them, hands them weights and rows, and gets tokens. They are its children and end with
it, however it ends. One that dies, or says nothing for `collective_timeout`, is a failure of the
stage, which is retried from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from multiprocessing.connection import Connection, wait
from pathlib import Path
from socket import socketpair
from typing import Any

import torch
from torch import Tensor

from rlhf_core.errors import ConfigError, JobFailed, Preempted
from rlhf_core.jobs import OnlineJob, VllmRollout
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.sharded import is_sharded, whole
from rlhf_core.rollout.engine_weights import policy_weights
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.rollout.handover import Handover, Head
from rlhf_core.rollout.queue import QueuedReply
from rlhf_core.runtime.stopping import stop
from rlhf_core.system.cpus import cpu_cores
from rlhf_core.system.processes import die_with_parent, python_path
from rlhf_core.training.online.sampler_process import MODULE, SHOW_STACK, Row, Setup
from rlhf_core.training.strategy import HALF, Strategy

END_SECONDS = 10.0  # that a killed process has to end
POLL_SECONDS = 0.1
STACK_SECONDS = 1.0  # that a sampler has to show what it does, before it is ended


class SamplingStopped(Preempted):
    """The job was told to stop while replies were sampled."""


def ends(running: Future[Any]) -> bool:
    """Wait for a call in another thread; False where the job is told to stop before it ends."""
    while not wait_for([running], POLL_SECONDS).done:
        if stop.requested:
            return False
    return True


class Samplers:
    """The sampling processes of a stage. Rank 0 has them; methods say who calls."""

    def __init__(self, job: OnlineJob, strategy: Strategy, setup: Setup, folder: Path) -> None:
        """Start them; they load the policy while this process goes on. Every rank calls.

        Args:
            setup: of the first one. folder: for weights where memory has to be a file.

        Raises:
            ConfigError: there are too few GPUs.
        """
        self.job, self.strategy, self.folder = job, strategy, folder
        self.thread = ThreadPoolExecutor(1, "samplers")
        """In which rank 0 asks, one call after another."""
        self.longest_silence = float(job.resources.collective_timeout)
        """Seconds for which samplers may return nothing, also while they start."""
        self._heads: list[Head] | None = None  # of all weights
        self._children: list[_Child] = []
        if strategy.rank == 0:
            devices = own_devices(job) if strategy.device.type == "cuda" else None
            for number in range(job.rollout.ranks):
                device = None if devices is None else devices[number]
                self._children.append(_Child(setup._replace(number=number), device))

    def hand_over(self, policy: Policy) -> Handover | None:
        """The weights as they are now; rank 0 has them. Every rank calls."""
        if self.strategy.rank > 0 and not is_sharded(policy):
            return None  # no part of a weight is elsewhere than on rank 0
        heads, tensors = self._handed_over(policy)
        if self.strategy.rank == 0:
            return Handover.written(self.folder, heads, tensors)
        for _ in tensors:  # each is gathered from all ranks
            pass
        return None

    def _handed_over(self, policy: Policy) -> tuple[list[Head], Iterable[Tensor]]:
        """What samplers need of a policy: what is trained, or all weights (adapters merged) for
        vLLM.

        Returns:
            Names, types and shapes; and the tensors one by one, where sharded on all ranks at once.
        """
        if not isinstance(self.job.rollout, VllmRollout):
            return trained_weights(self.strategy, policy)
        if self._heads is None:  # by a pass of its own: no second copy of all is in memory
            found = policy_weights(policy)
            self._heads = [(name, w.dtype, tuple(w.shape)) for name, w in found]
        return self._heads, (weight for _, weight in policy_weights(policy))

    def roll_out(
        self,
        policy: Policy,
        prompt_ids: Sequence[list[int]],
        row_seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> list[QueuedReply]:
        """A reply to each prompt from the policy as it is now, on every rank. Every rank calls.

        Args:
            on_finished: is handed each reply when it ends, on rank 0, in another thread.

        Raises:
            SamplingStopped: the job was told to stop meanwhile; on every rank.
            JobFailed: a sampler has failed or died; on rank 0.
        """
        handed, replies = self.hand_over(policy), None
        if handed is not None:
            whole = self.job.max_new_tokens
            prompts = zip(prompt_ids, row_seeds, strict=True)
            rows = [Row(i, ids, seed, 0, whole) for i, (ids, seed) in enumerate(prompts)]
            asked = self.thread.submit(self.ask, handed, rows, on_finished)
            if ends(asked):
                replies = asked.result()
                handed.close()
        replies = self.strategy.group.broadcast(replies)
        if replies is None:
            raise SamplingStopped(
                "told to stop while replies were sampled; the last checkpoint is intact"
            )
        return replies  # type: ignore[no-any-return]

    def ask(
        self, weights: Handover, rows: Sequence[Row], on_finished: OnFinished | None = None
    ) -> list[QueuedReply]:
        """Sample. Rank 0 alone, in `thread`.

        Args:
            rows: each with its position in the list as its index.

        Returns:
            The new tokens of each row, without versions.

        Raises:
            JobFailed: a sampler has failed, died, or says nothing.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        asked = {}
        for number, child in enumerate(self._children):
            if mine := [rows[i] for i in order[number :: len(self._children)]]:
                child.send({"weights": str(weights.path), "rows": mine})
                asked[child.connection] = child
        found: dict[int, QueuedReply] = {}
        while asked:
            ready = wait(list(asked), self.longest_silence)
            if not ready:
                for child in asked.values():
                    child.process.send_signal(SHOW_STACK)
                time.sleep(STACK_SECONDS)
                raise JobFailed(self._silent([child.number for child in asked.values()]), "hang")
            for connection in ready:
                replies = asked[connection].receive()
                if replies is None:
                    del asked[connection]
                    continue
                found |= {r.row: QueuedReply(r.ids, r.logprobs, [], r.finished) for r in replies}
                if on_finished is not None:
                    on_finished(replies)
        return [found[i] for i in range(len(rows))]

    def _silent(self, numbers: list[int]) -> str:
        return (
            f"Of the samplers, {', '.join(map(str, numbers))} have returned no reply for "
            f"{self.longest_silence:g} s (resources.collective_timeout). Raise it if starting one, "
            "or sampling one reply, can take longer; else see their Python stacks in the log. The "
            "retry starts new ones."
        )

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        for child in self._children:
            child.end()
        self._children = []
        self.thread.shutdown(cancel_futures=True)


class _Child:
    """One process, as rank 0 sees it."""

    def __init__(self, setup: Setup, device: str | None) -> None:
        self.number, self._ready = setup.number, False
        ours, theirs = socketpair()
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        }
        environment |= {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": str(setup.threads)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno())],
                env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,  # also while it still imports
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self.send(setup._asdict())

    def send(self, message: object) -> None:
        """A message; if it has died, `receive` tells."""
        with contextlib.suppress(ConnectionError):
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> list[FinishedReply] | None:
        """The next part of its answer; None at the end of it.

        Raises:
            JobFailed: it has failed or died.
        """
        try:
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise JobFailed(self._died()) from None
        if "failed" in message:
            text = f"Sampler {self.number} failed: {message['message']}"
            raise JobFailed(text, message["failed"])
        if "done" in message:
            return None
        return [FinishedReply(*reply) for reply in message.get("replies", ())]

    def _died(self) -> str:
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        killed = "; the kernel kills a process when memory runs out" if code == -9 else ""
        return (
            f"Sampler {self.number} (process {self.process.pid}) ended {how}{killed}. The stage "
            "goes on from its last checkpoint when it is tried again."
        )

    def end(self) -> None:
        """End it."""
        self.process.kill()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"WARNING: sampler {self.process.pid} does not end", flush=True)
        self.connection.close()


def trained_weights(strategy: Strategy, policy: Policy) -> tuple[list[Head], Iterable[Tensor]]:
    """What is trained of a policy, in the precision of its passes; see `Samplers._handed_over`."""
    half = HALF.get(strategy.precision) if is_sharded(policy) else None
    params = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    heads = [(name, half or p.dtype, tuple(p.shape)) for name, p in params.items()]
    return heads, (whole(p.detach()).to(half or p.dtype) for p in params.values())


def own_devices(job: OnlineJob) -> list[str]:
    """The GPUs of each sampler, as CUDA_VISIBLE_DEVICES names them: those after the ranks'.

    Raises:
        ConfigError: there are too few.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), job.rollout.gpus
    count = torch.cuda.device_count()
    if ranks + gpus > count:
        raise ConfigError(
            f"{job.algorithm}.rollout takes {gpus} GPUs for {job.rollout.ranks} samplers (ranks) "
            f"beside {ranks} training ranks, and this machine shows {count}: lower one of them, or "
            "set rollout.placement to colocated."
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if named is None else named.split(",")
    each = gpus // job.rollout.ranks
    own = [name.strip() for name in names[ranks : ranks + gpus]]
    return [",".join(own[start : start + each]) for start in range(0, gpus, each)]


def share_cores(job: OnlineJob) -> int:
    """CPU threads of each training rank of this node and of each sampler. They take turns at
    max_staleness 0, where each has as many as a training rank has without samplers."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    busy = ranks if job.rollout.max_staleness == 0 else ranks + job.rollout.ranks
    return job.resources.threads or max(1, cpu_cores() // busy)
