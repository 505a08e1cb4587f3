"""Sampling responses for RL: a decode loop whose result depends on seeds alone.

What sets it apart from ``model.generate``: a row's tokens are a function of its own uniforms, not
of the batch or rank that it is decoded in; the log-probabilities come out with the tokens; rows
that have ended leave the batch; a prompt that is there several times is read once; logits exist
only at the last position.

B prompts, T = max_new_tokens response positions, V vocabulary, b rows still being decoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn.backbone import accepted, backbone, causal_lm, eval_mode, position_ids_from_mask
from rlhf_core.nn.small_batch_linear import few_rows
from rlhf_core.nn.vocabulary_head import lm_head
from rlhf_core.rollout.grouped_attention import shared_heads
from rlhf_core.rollout.kv_cache import new_cache

_BLOCK = 64  # of the two-level inverse CDF


@dataclass(frozen=True)
class Rollout:
    """Responses in the order of their prompts, on the model's device.

    A row's mask ends with its first end-of-turn token, included, or with the length limit.
    """

    response_ids: Tensor  # (B,T) long, right-padded with pad_id
    response_mask: Tensor  # (B,T) bool, True = real
    logprobs: Tensor  # (B,T) fp32, nats at the sampling temperature, 0 in padded places
    finished: Tensor  # (B,) bool, ended with an end-of-turn token rather than at the limit

    def trimmed(self) -> Rollout:
        """The same without the columns at the end in which no row has a token."""
        width = int(self.response_mask.any(dim=0).sum())
        return Rollout(
            self.response_ids[:, :width],
            self.response_mask[:, :width],
            self.logprobs[:, :width],
            self.finished,
        )


# ---------------------------------------------------------------------------------- randomness
def make_row_seeds(seed: int, step: int, rows: Sequence[int]) -> list[int]:
    """A 64-bit seed for each row of a step's global batch, whatever rank it falls to.

    Args:
        seed: the job's. step: of the rollout. rows: indices within the global batch.
    """
    return [
        int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0])
        for row in rows
    ]


def row_uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), one per row and step, each row from its own Philox generator.

    A longer row begins with the numbers of a shorter one.

    Args:
        seeds: B non-negative integers below 2**128. length: T.

    Returns:
        (B,T) fp64.
    """
    if not seeds:
        return torch.zeros(0, length, dtype=torch.float64)
    rows = [np.random.Generator(np.random.Philox(key=s)).random(length) for s in seeds]
    return torch.from_numpy(np.stack(rows))


def sample_inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability first exceeds a row's uniform number.

    The whole vocabulary, in two levels: sums of 64 neighbours first, then one block's tokens. A
    token whose logit is -inf is never drawn.

    Args:
        logits: (b,V) fp32. uniforms: (b,) in [0, 1).

    Returns:
        Token ids (b,) and the log-sum-exp of each row (b,) fp64, which comes out on the way.
    """
    rows, vocabulary = logits.shape
    highest = logits.amax(dim=1, keepdim=True)  # (b,1)
    weights = (logits - highest).exp_()  # (b,V)
    if short := -vocabulary % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, short))
    weights = weights.view(rows, -1, _BLOCK)
    cumulative = weights.sum(dim=2).cumsum(dim=1, dtype=torch.float64)  # (b, V/64)
    target = uniforms.to(cumulative).unsqueeze(1) * cumulative[:, -1:]  # (b,1)
    block = _first_above(cumulative, target)  # (b,1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)  # (b,1)
    inside = weights.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)  # (b,64)
    offset = _first_above(inside.double().cumsum(dim=1), target - before)  # (b,1)
    norm = highest.double() + cumulative[:, -1:].log()  # (b,1)
    return (block * _BLOCK + offset).squeeze(1), norm.squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index (b,1) of the first entry above target; by rounding there may be none, then of the
    last entry that adds something."""
    last = (cumulative < cumulative[:, -1:]).sum(dim=1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


# -------------------------------------------------------------------------------------- decode
def generate(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: set[int],
    pad_id: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    row_seeds: Sequence[int] | None = None,
    greedy: bool = False,
    batch_size: int = 64,
) -> Rollout:
    """Samples one response per prompt, over the full vocabulary (no top-k, no top-p).

    Dropout is off inside and every module's mode is restored after. Under autocast the model runs
    in its dtype; probabilities are fp32.

    Args:
        model: a transformers causal LM, unwrapped.
        prompt_ids: B prompts of at least one token each; repeat a prompt to sample it again.
        max_new_tokens: T, tokens. eos_ids: any of these ends a response. pad_id: fills the rest
            and may be one of ``eos_ids``.
        temperature: of the distribution that is sampled and whose log-probabilities are returned.
        uniforms: (B,T) in [0, 1), or else row_seeds: B integers, see ``row_uniforms``.
        greedy: take the likeliest token (uniforms are not needed).
        batch_size: rows decoded together; does not change the result but for rounding.

    Returns:
        A Rollout with T columns, rows in the order of the prompts.

    Raises:
        ValueError: an empty prompt (named), a temperature that is not positive, not exactly one
            source of randomness, or uniforms of another shape.
    """
    count = len(prompt_ids)
    _check(prompt_ids, max_new_tokens, temperature, batch_size)
    if not greedy:
        uniforms = _uniforms(uniforms, row_seeds, count, max_new_tokens)  # (B,T)
    device = next(model.parameters()).device
    shape = (count, max_new_tokens)
    result = Rollout(
        torch.full(shape, pad_id, dtype=torch.long, device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
        torch.zeros(shape, dtype=torch.float32, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
    )
    # neighbours of like length share a batch: little padding
    order = sorted(range(count), key=lambda i: len(prompt_ids[i]), reverse=True)
    stop = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    try:
        with (
            torch.no_grad(), eval_mode(model), shared_heads(causal_lm(model)), few_rows(model),
            _cached_casts(model, device),
        ):  # fmt: skip
            decoder = _Decoder(model, temperature, stop)
            for start in range(0, count, batch_size):
                rows = order[start : start + batch_size]
                prompts = [prompt_ids[i] for i in rows]
                numbers = None if uniforms is None or greedy else uniforms[rows].to(device)
                decoder.decode(prompts, rows, numbers, pad_id, result)
    finally:
        # autocast caches its half-precision copies of the weights: those made here know no
        # gradient, and a training step in the same autocast block must not meet them
        torch.clear_autocast_cache()
    return result


@contextlib.contextmanager
def _cached_casts(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let autocast keep its half-precision copies of frozen weights from step to step.

    It keeps those of weights that require a gradient; the others it would cast again with every
    token, which took a tenth of the time for a batch of 32.
    """
    frozen = []
    if torch.is_autocast_enabled(device.type):
        frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for param in frozen:
            param.requires_grad_(True)
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)


def _check(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, batch_size: int
) -> None:
    if not temperature > 0:
        raise ValueError(f"found temperature {temperature}, needed > 0; use greedy=True for 0")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"found max_new_tokens {max_new_tokens} and batch_size {batch_size}, needed >= 1"
        )
    for i, prompt in enumerate(prompt_ids):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty, at least one token is needed")


def _uniforms(
    uniforms: Tensor | None, row_seeds: Sequence[int] | None, count: int, length: int
) -> Tensor:
    if (uniforms is None) == (row_seeds is None):
        raise ValueError("pass exactly one of uniforms and row_seeds, or greedy=True")
    if uniforms is None:
        assert row_seeds is not None
        if len(row_seeds) != count:
            raise ValueError(f"found {len(row_seeds)} row_seeds for {count} prompts")
        uniforms = row_uniforms(row_seeds, length)
    if uniforms.shape != (count, length):
        raise ValueError(f"needed uniforms ({count},{length}), found {tuple(uniforms.shape)}")
    return uniforms


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The u different ones among b prompts, and for each of the b which of them it is."""
    found: dict[tuple[int, ...], int] = {}
    which = [found.setdefault(tuple(prompt), len(found)) for prompt in prompts]
    return list(found), which


class _Decoder:
    """The loop over steps of one batch; holds what all batches share."""

    def __init__(self, model: nn.Module, temperature: float, stop: Tensor) -> None:
        self.lm = causal_lm(model)
        self.head = lm_head(model)
        self.temperature = temperature
        self.stop = stop
        # through the backbone and only then the head: a prompt's logits are never computed
        self.module = self.lm if self.head is None else backbone(self.lm)
        self.takes_positions = "position_ids" in accepted(self.module.forward, position_ids=None)
        self.takes_keep = "logits_to_keep" in accepted(self.module.forward, logits_to_keep=1)

    def decode(
        self,
        prompts: list[Sequence[int]],
        rows: list[int],
        uniforms: Tensor | None,
        pad_id: int,
        result: Rollout,
    ) -> None:
        """Decodes a batch and writes it into the given rows of the result."""
        device = result.response_ids.device
        width, steps = max(len(p) for p in prompts), result.response_ids.shape[1]
        distinct, which = _distinct(prompts)
        inputs = torch.full((len(distinct), width), pad_id, dtype=torch.long)  # (u,P)
        attention = torch.ones(len(distinct), width + steps, dtype=torch.long)  # (u,P+T)
        for i, prompt in enumerate(distinct):
            inputs[i, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            attention[i, : width - len(prompt)] = 0
        inputs, attention = inputs.to(device), attention.to(device)
        alive = torch.tensor(rows, device=device)  # (b,) row of the result
        positions = position_ids_from_mask(attention)  # (u,P+T)
        cache = new_cache(self.lm.config, width + steps)
        logits = self._logits(inputs, attention[:, :width], positions[:, :width], cache)  # (u,V)
        if len(distinct) < len(rows):
            same = torch.tensor(which, device=device)  # (b,)
            # (b,V), (b,P+T), (b,P+T)
            logits, attention, positions = (x[same] for x in (logits, attention, positions))
            cache.batch_select_indices(same)
        for step in range(steps):
            seen = width + step
            if step:
                logits = self._logits(
                    inputs, attention[:, :seen], positions[:, seen - 1 : seen], cache
                )  # (b,V)
            if uniforms is None:
                token, norm = logits.argmax(dim=1), logits.logsumexp(dim=1)  # (b,), (b,)
            else:
                token, norm = sample_inverse_cdf(logits, uniforms[:, step])  # (b,), (b,)
            picked = logits.gather(1, token.unsqueeze(1)).squeeze(1)  # (b,)
            result.response_ids[alive, step] = token
            result.response_mask[alive, step] = True
            result.logprobs[alive, step] = (picked - norm).float()
            ended = torch.isin(token, self.stop)  # (b,)
            result.finished[alive] = ended
            inputs = token.unsqueeze(1)  # (b,1)
            if bool(ended.any()):
                keep = (~ended).nonzero().squeeze(1)
                if keep.numel() == 0:
                    return
                cache.batch_select_indices(keep)
                inputs, attention, positions, alive = (
                    x[keep] for x in (inputs, attention, positions, alive)
                )
                uniforms = uniforms[keep] if uniforms is not None else None

    def _logits(
        self, inputs: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
    ) -> Tensor:
        """Logits (b,V) of the next token, divided by the temperature."""
        options: dict[str, Any] = {"position_ids": position_ids} if self.takes_positions else {}
        if self.head is None and self.takes_keep:
            options["logits_to_keep"] = 1
        output = self.module(
            input_ids=inputs,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        last = output[0][:, -1]  # (b,V) or (b,d)
        logits = upcast(last) if self.head is None else self.head.logits(last)
        return logits / self.temperature if self.temperature != 1.0 else logits
