"""vLLM in the training process: rollouts of a policy whose weights change after each of them.

One engine per rank, each with a whole copy of the model (data parallel); or, with
`rollout.tensor_parallel`, one for that many neighbouring ranks, each of which holds a part of every
layer. No process hands out work there ("external_launcher"): every rank of an engine must pass the
same prompts and seeds in the same order, and gets the same replies. An engine in a process of its
own (`rollout.placement: separate`) is alone, and starts workers ("mp") where it has several GPUs.

An engine starts with random weights and gets the policy's before every rollout, parameter by
parameter and without a file. If an update is missed, the engine samples noise, and the stage fails
(`rollout.max_logprob_gap`).

vLLM 0.32 assumes that it owns its process: it seeds the global generators, replaces
`torch.set_num_threads` by a no-op (on a CPU), and destroys torch's default process group, the
trainer's, when it closes. This module undoes or prevents that.

B prompts, T = max_new_tokens response positions.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import Precision, VllmRollout
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.rollout.engine_weights import policy_weights, put, put_from
from rlhf_core.rollout.finished import FinishedReply, OnFinished
from rlhf_core.rollout.generate import Rollout
from rlhf_core.rollout.limits import MISSING, version_problem
from rlhf_core.system.processes import die_with_parent

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOGETHER = 256  # maximum rows decoded at once
PREFILL = 8192  # maximum prompt tokens per prefill, unless one prompt is longer
# One process, no telemetry, no plugins. torchrun's variables stay as they are.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_PLUGINS": "",
}


class VllmEngine:
    """A vLLM engine with the architecture of a model folder and the weights passed to it."""

    def __init__(
        self,
        source: Path,
        settings: VllmRollout,
        *,
        precision: Precision,
        device: torch.device,
        rank: int = 0,
        longest: int,
        together: int = TOGETHER,
    ) -> None:
        """Start it. Every rank of the process group must do so at the same time.

        Args:
            source: a Hugging Face folder; its weights are not read.
            precision: the trainer's, in which the engine computes and holds its weights.
            device: the trainer's. rank: within the process group.
            longest: maximum tokens of a prompt and its reply together.
            together: rows decoded at once.

        Raises:
            ConfigError: vLLM is not installed, is built for another device, or refuses the model or
                its memory.
        """
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if find_spec("vllm") is None:
            raise ConfigError(MISSING)
        with _trainer_unchanged(rank):
            import vllm
            from vllm.distributed import parallel_state
            from vllm.platforms import current_platform

            # The default group is the trainer's. vLLM's own groups are destroyed all the same.
            parallel_state.destroy_distributed_environment = _nothing
            self.version = str(vllm.__version__)
            if problem := version_problem(self.version):
                raise ConfigError(problem)
            self.tensor_parallel = settings.tensor_parallel
            self.device = device
            self.on_cpu = bool(current_platform.is_cpu())
            if self.on_cpu != (device.type == "cpu"):
                raise ConfigError(
                    f"This vLLM is built for {current_platform.device_type}, and the ranks run on "
                    f"{device.type}: install the other build (docs/training.md), or set "
                    "resources.device, or the rollout type builtin."
                )
            try:  # with one token sampled: not every layer that can be built can also be run
                self._llm = self._start(source, settings, precision, longest, together)
                one = vllm.SamplingParams(max_tokens=1, detokenize=False)
                self._llm.generate([{"prompt_token_ids": [0]}], one, use_tqdm=False)
                if _has_workers(settings):
                    self._llm.collective_rpc(_end_with_parent)
            except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
                raise ConfigError(
                    f"vLLM {self.version} cannot be started for this model: {error}. Use the "
                    "rollout type builtin, or change what it names."
                ) from error

    def _start(
        self,
        source: Path,
        settings: VllmRollout,
        precision: Precision,
        longest: int,
        together: int,
    ) -> Any:
        """A `vllm.LLM`; the arguments are those of `__init__`."""
        import vllm

        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if self.on_cpu:  # the share would be one of main memory, and never given back
            memory = {"kv_cache_memory_bytes": settings.cpu_cache_mib * 2**20}
        elif not settings.separate:  # beside a trainer, whose updates need the memory
            memory["enable_sleep_mode"] = True
            torch.cuda.empty_cache()
        return vllm.LLM(
            model=str(source),
            load_format="dummy",
            dtype=DTYPES[precision],
            skip_tokenizer_init=True,
            trust_remote_code=is_trusted(source),
            distributed_executor_backend="mp" if _has_workers(settings) else "external_launcher",
            tensor_parallel_size=settings.tensor_parallel,
            max_model_len=longest,
            max_num_seqs=min(together, TOGETHER),
            # A prompt read in pieces draws a random number for each piece, so that the reply
            # would depend on the other prompts (and on a CPU it fails).
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(longest, PREFILL),
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled
            enforce_eager=self.on_cpu,  # compiling takes longer than it saves
            disable_log_stats=True,
            **memory,
        )

    # ------------------------------------------------------------------------------ rollouts

    def roll_out(
        self, policy: nn.Module, prompt_ids: Sequence[Sequence[int]], **options: Any
    ) -> Rollout:
        """One rollout of the policy as it is now: wake, `update`, `generate`, sleep.

        Args:
            policy: see `policy_weights`.
        """
        self.wake("weights")
        self.update(policy_weights(policy))
        self.wake("kv_cache")
        rollout = self.generate(prompt_ids, **options)
        self.sleep()
        return rollout

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights in memory, and drop the prefix cache.

        Args:
            weights: name in a checkpoint of the model -> tensor, on any device, in any precision.

        Raises:
            ModelError: weights are missing, or have a name or shape that the engine does not know.
        """
        self._check(self._llm.collective_rpc(put, args=(weights,)))

    def read(self, weights: Path) -> None:
        """`update` from a `Handover`'s path, which each of the engine's processes reads.

        Raises:
            ModelError: as `update`.
        """
        self._check(self._llm.collective_rpc(put_from, args=(str(weights),)))

    def _check(self, done: list[tuple[set[str], set[str] | None]]) -> None:
        """All weights are there, on each of the engine's GPUs. Drops the prefix cache."""
        for expected, loaded in done:
            if loaded is not None and (missing := sorted(expected - loaded)):
                raise ModelError(
                    f"vLLM was given no weights for {len(missing)} of {len(expected)} parameters, "
                    f"e.g. {', '.join(missing[:3])}: it names this architecture's weights "
                    "otherwise. Use the rollout type builtin."
                )
        self._llm.reset_prefix_cache()

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_ids: set[int],
        pad_id: int,
        temperature: float = 1.0,
        row_seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> Rollout:
        """`rlhf_core.rollout.generate.generate` with vLLM: same arguments, same contract.

        A row's random numbers depend on its own seed only, but differ from the built-in loop's: the
        two backends sample different replies from the same distribution.

        Raises:
            ValueError: an empty prompt (named), or not one seed per prompt.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if len(row_seeds) != len(prompt_ids):
            raise ValueError(f"found {len(row_seeds)} row_seeds for {len(prompt_ids)} prompts")
        for i, prompt in enumerate(prompt_ids):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty, at least one token is needed")
        wanted = [
            SamplingParams(
                temperature=temperature,
                seed=seed >> 1,  # its GPU sampler holds them in a signed integer of 64 bits
                max_tokens=max_new_tokens,
                stop_token_ids=sorted(eos_ids),
                ignore_eos=True,  # the config's stop tokens may be others
                logprobs=0,  # of the sampled token only
                detokenize=False,
            )
            for seed in row_seeds
        ]
        replies: list[FinishedReply] = []
        if wanted:
            prompts = [TokensPrompt(prompt_token_ids=list(p)) for p in prompt_ids]
            with torch.random.fork_rng():  # its CPU sampler also draws from the global generator
                for done in self._finished(prompts, wanted):
                    replies += done
                    if on_finished is not None:
                        on_finished(done)
        shape = (len(prompt_ids), max_new_tokens)
        ids = torch.full(shape, pad_id, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        logprobs = torch.zeros(shape, dtype=torch.float32)
        finished = torch.zeros(len(prompt_ids), dtype=torch.bool)
        for reply in replies:
            i, n = reply.row, len(reply.ids)
            ids[i, :n] = torch.tensor(reply.ids)
            mask[i, :n] = True
            logprobs[i, :n] = torch.tensor(reply.logprobs)
            finished[i] = reply.finished
        return Rollout(*(x.to(self.device) for x in (ids, mask, logprobs, finished)))

    def _finished(self, prompts: list[Any], wanted: list[Any]) -> Iterator[list[FinishedReply]]:
        """Decode; the replies that ended, after each step of the engine in which some did."""
        # An id is the number of the request, with a random ending that outputs do not have.
        names = self._llm.enqueue(prompts, wanted, use_tqdm=False)
        rows = {name.partition("-")[0]: row for row, name in enumerate(names)}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            if done := [output for output in engine.step() if output.finished]:
                yield [_reply(rows[output.request_id], output.outputs[0]) for output in done]

    # -------------------------------------------------------------------------------- memory

    def sleep(self) -> None:
        """Release the GPU's memory until `wake`. On a CPU vLLM keeps its memory."""
        if self.on_cpu:
            self._llm.reset_prefix_cache()
        else:
            self._llm.sleep(level=2)  # the weights too: `update` brings them again

    def wake(self, what: str) -> None:
        """Allocate memory for the "weights", or after that for the "kv_cache"."""
        if not self.on_cpu:
            torch.cuda.empty_cache()  # the trainer's unused memory goes to the engine
            self._llm.wake_up(tags=[what])

    def close(self) -> None:
        """Shut it down and free its memory; a second call does nothing."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if not self.on_cpu:
                torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------- the process


def _reply(row: int, output: Any) -> FinishedReply:
    """From vLLM's `CompletionOutput`."""
    ids = list(output.token_ids)
    at = zip(ids, output.logprobs, strict=True)
    logprobs = [candidates[token].logprob for token, candidates in at]
    return FinishedReply(row, ids, logprobs, output.finish_reason == "stop")


def _has_workers(settings: VllmRollout) -> bool:
    """Whether an engine starts processes for its GPUs; else it is in one, or in torchrun's."""
    return settings.separate and settings.tensor_parallel > 1


def _end_with_parent(worker: Any) -> None:
    """Runs in each worker of an engine of its own; the engine's process may be killed."""
    die_with_parent()


def _nothing() -> None:
    """Replaces a function that must not run."""


@contextlib.contextmanager
def _trainer_unchanged(rank: int) -> Iterator[None]:
    """Restore what starting vLLM changes: random generators, threads, `torch.set_num_threads`."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    generators = random.getstate(), np.random.get_state()
    given = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK")}
    for name, value in given.items():
        os.environ[name] = value or str(rank)  # the engine needs them; torchrun sets them
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for name, value in given.items():
            if value is None:
                os.environ.pop(name, None)
