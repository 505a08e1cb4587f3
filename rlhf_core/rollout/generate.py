"""Sampling responses for RL: a decode loop whose result depends on seeds alone.

Unlike in ``model.generate``, a row's tokens are a function of its own uniforms, not of the batch or
rank that it is decoded in; the log-probabilities come with the tokens; rows that have ended leave
the batch; a repeated prompt is read once; logits are computed only at the last position.

B prompts, T = max_new_tokens response positions, V vocabulary, b rows still being decoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn import small_batch_linear
from rlhf_core.nn.backbone import accepted, backbone, causal_lm, position_ids_from_mask
from rlhf_core.nn.fast_paths import patched, run, switched_on
from rlhf_core.nn.padding import to_device
from rlhf_core.nn.probe_model import eval_mode
from rlhf_core.nn.vocabulary_head import lm_head
from rlhf_core.rollout import grouped_attention, kv_cache
from rlhf_core.rollout.finished import OnFinished, finished_replies
from rlhf_core.rollout.sampling import row_uniforms, sample_inverse_cdf


@dataclass(frozen=True)
class Rollout:
    """Responses in the order of their prompts, on the model's device.

    A row's mask ends with its first end-of-turn token, which it includes, or at the length limit.
    """

    response_ids: Tensor  # (B,T) long, right-padded with pad_id
    response_mask: Tensor  # (B,T) bool, True = real
    logprobs: Tensor  # (B,T) fp32, nats at the sampling temperature, 0 at padding
    finished: Tensor  # (B,) bool: ended with an end-of-turn token, not at the limit

    @classmethod
    def empty(cls, count: int, length: int, pad_id: int, device: torch.device) -> Rollout:
        """B = count rows of T = length columns without a token."""
        shape = (count, length)
        return cls(
            torch.full(shape, pad_id, dtype=torch.long, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )

    def cpu(self) -> Rollout:
        """The same on the CPU: one copy for all rows, whoever reads them one by one."""
        return Rollout(*(getattr(self, field.name).cpu() for field in fields(self)))

    def trimmed(self) -> Rollout:
        """The same without the columns at the end in which no row has a token."""
        width = int(self.response_mask.any(dim=0).sum())
        return Rollout(
            self.response_ids[:, :width],
            self.response_mask[:, :width],
            self.logprobs[:, :width],
            self.finished,
        )


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
    before_pass: Callable[[], None] | None = None,
    on_finished: OnFinished | None = None,
) -> Rollout:
    """Samples one response per prompt, over the full vocabulary (no top-k, no top-p).

    Dropout is off, and every module's mode is restored. Under autocast the model runs in its dtype;
    probabilities are fp32.

    Args:
        model: a transformers causal LM, unwrapped.
        prompt_ids: B prompts of at least one token each; repeat a prompt to sample it again.
        max_new_tokens: T, tokens. eos_ids: any of these ends a response. pad_id: the padding; may
            be one of ``eos_ids``.
        temperature: of the distribution that is sampled; the log-probabilities are those of it.
        uniforms: (B,T) in [0, 1), or else row_seeds: B integers, see ``row_uniforms``.
        greedy: take the likeliest token (uniforms are not needed).
        batch_size: rows decoded together; changes the result by rounding only.
        before_pass: called before each forward pass of the model.
        on_finished: is handed the replies as they end.

    Returns:
        A Rollout with T columns, rows in the order of the prompts.

    Raises:
        ValueError: an empty prompt (named), a temperature that is not positive, not exactly one
            source of randomness, or uniforms of another shape.
    """
    count = len(prompt_ids)
    _check(prompt_ids, max_new_tokens, temperature, batch_size)
    uniforms = None if greedy else _uniforms(uniforms, row_seeds, count, max_new_tokens)  # (B,T)
    device = next(model.parameters()).device
    result = Rollout.empty(count, max_new_tokens, pad_id, device)
    # rows of similar length share a batch: little padding
    order = sorted(range(count), key=lambda i: len(prompt_ids[i]), reverse=True)
    stop = to_device(torch.tensor(sorted(eos_ids), dtype=torch.long), device)
    try:
        with torch.no_grad(), eval_mode(model), _cached_casts(model, device):
            decoder = _Decoder(model, temperature, stop, pad_id, before_pass, on_finished)
            for start in range(0, count, batch_size):
                rows = order[start : start + batch_size]
                numbers = None if uniforms is None else to_device(uniforms[rows], device)
                _decode(decoder, _Batch([prompt_ids[i] for i in rows], rows, numbers), result)
    finally:
        # autocast caches half-precision copies of the weights. Those cast here have no gradient,
        # so a training step in the same autocast block must not use them
        torch.clear_autocast_cache()
    return result


class _Batch(NamedTuple):
    """Rows that are decoded together."""

    prompts: list[Sequence[int]]  # b
    rows: list[int]  # b indices into the result
    uniforms: Tensor | None  # (b,T); None: the likeliest token


def _decode(decoder: _Decoder, batch: _Batch, result: Rollout) -> None:
    """Write a batch's responses into the result, by the fast paths that work for this model."""
    lm = decoder.lm

    def fast() -> None:
        with grouped_attention.installed(lm), small_batch_linear.installed(lm):
            decoder.decode(batch, result, kv_cache.new_cache)

    modules = (grouped_attention, small_batch_linear, kv_cache)
    paths = [module.PATH for module in modules if module.is_used(lm)]
    run(paths, lm, fast, lambda: decoder.decode(batch, result, kv_cache.dynamic_cache))


@contextlib.contextmanager
def _cached_casts(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let autocast keep its half-precision copies of frozen weights between steps.

    It keeps only copies of weights that require a gradient, and would cast the others again with
    every token: a tenth of the time of a batch of 32.
    """
    frozen = []
    if switched_on() and torch.is_autocast_enabled(device.type):
        frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    with patched(*((param, "requires_grad", True) for param in frozen)):
        yield


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
    """The u distinct prompts among b, and for each of the b its index among them."""
    index: dict[tuple[int, ...], int] = {}
    which = [index.setdefault(tuple(prompt), len(index)) for prompt in prompts]
    return list(index), which


def _left_padded(
    prompts: Sequence[Sequence[int]], steps: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Prompts (u,P), and the attention mask (u,P+T) of them and T = steps tokens behind them."""
    width = max(len(p) for p in prompts)
    inputs = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention = torch.ones(len(prompts), width + steps, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        inputs[i, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention[i, : width - len(prompt)] = 0
    return inputs, attention


class _Decoder:
    """The decode loop of one batch, and what all batches share."""

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        stop: Tensor,
        pad_id: int,
        before_pass: Callable[[], None] | None,
        on_finished: OnFinished | None,
    ) -> None:
        self.lm = causal_lm(model)
        self.head = lm_head(model)
        self.temperature = temperature
        self.stop = stop
        self.pad_id = pad_id
        self.before_pass = before_pass
        self.on_finished = on_finished
        # the backbone first, then the head at the last position: no logits of the prompt
        self.module = self.lm if self.head is None else backbone(self.lm)
        self.takes_positions = "position_ids" in accepted(self.module.forward, position_ids=None)
        self.takes_keep = "logits_to_keep" in accepted(self.module.forward, logits_to_keep=1)

    def decode(self, batch: _Batch, result: Rollout, new_cache: Callable[[Any, int], Any]) -> None:
        """Decodes a batch and writes it into its rows of the result.

        Args:
            new_cache: makes the cache for a model and the positions P+T of a row.
        """
        device, steps = result.response_ids.device, result.response_ids.shape[1]
        uniforms = batch.uniforms
        distinct, which = _distinct(batch.prompts)
        inputs, attention = (
            to_device(x, device) for x in _left_padded(distinct, steps, self.pad_id)
        )
        width = inputs.shape[1]
        rows = batch.rows  # b rows of the result
        alive = to_device(torch.tensor(rows), device)  # (b,) the same
        result.response_ids[alive] = self.pad_id
        result.response_mask[alive] = False
        positions = position_ids_from_mask(attention)  # (u,P+T)
        cache = new_cache(self.lm, width + steps)
        logits = self._logits(inputs, attention[:, :width], positions[:, :width], cache)  # (u,V)
        if len(distinct) < len(batch.rows):
            same = to_device(torch.tensor(which), device)  # (b,)
            # (b,V), (b,P+T), (b,P+T)
            logits, attention, positions = (x[same] for x in (logits, attention, positions))
            cache.batch_select_indices(same)
        for step in range(steps):
            seen = width + step
            if step:
                logits = self._logits(
                    inputs, attention[:, :seen], positions[:, seen - 1 : seen], cache
                )  # (b,V)
            token, logprob = _draw(logits, None if uniforms is None else uniforms[:, step])
            result.response_ids[alive, step] = token
            result.response_mask[alive, step] = True
            result.logprobs[alive, step] = logprob
            ended = torch.isin(token, self.stop)  # (b,)
            result.finished[alive] = ended
            inputs = token.unsqueeze(1)  # (b,1)
            over = ended.tolist()
            self._hand_out(rows, over, result, step)
            going_on = [i for i in range(len(over)) if not over[i]]
            if not going_on:
                return
            if len(going_on) < len(ended):
                keep = to_device(torch.tensor(going_on), device)  # (b,)
                cache.batch_select_indices(keep)
                inputs, attention, positions, alive = (
                    x[keep] for x in (inputs, attention, positions, alive)
                )
                uniforms = uniforms[keep] if uniforms is not None else None
                rows = [rows[i] for i in going_on]

    def _hand_out(self, rows: list[int], over: list[bool], result: Rollout, step: int) -> None:
        """Hand out the replies that ended with this step's token, at the last step all others too.

        Args:
            rows: b rows of the result. over: b, whether they ended with an end-of-turn token.
        """
        if self.on_finished is None:
            return
        length = step + 1
        last = length == result.response_ids.shape[1]
        which = [i for i in range(len(rows)) if last or over[i]]
        if which:
            done = [rows[i] for i in which]
            ids, logprobs = result.response_ids[done, :length], result.logprobs[done, :length]
            self.on_finished(finished_replies(done, ids, logprobs, [over[i] for i in which]))

    def _logits(
        self, inputs: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
    ) -> Tensor:
        """Logits (b,V) of the next token, divided by the temperature."""
        options: dict[str, Any] = {"position_ids": position_ids} if self.takes_positions else {}
        if self.head is None and self.takes_keep:
            options["logits_to_keep"] = 1
        if self.before_pass is not None:
            self.before_pass()
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


def _draw(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens (b,) and their log-probabilities (b,) fp32, nats; the likeliest without uniforms."""
    if uniforms is None:
        token, norm = logits.argmax(dim=1), logits.logsumexp(dim=1)  # (b,), (b,)
    else:
        token, norm = sample_inverse_cdf(logits, uniforms)  # (b,), (b,)
    return token, (logits.gather(1, token.unsqueeze(1)).squeeze(1) - norm).float()
