"""How replies are sampled: each row of a batch by the parameters of its own request.

b rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_core.chat.model import Sampling
from rlhf_core.rollout.sampling import sample_inverse_cdf

OWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
COLDEST = 1e-5  # a lower temperature is greedy decoding


@dataclass(frozen=True)
class Options:
    """What a request says about sampling; None where it says nothing.

    Attributes:
        max_new_tokens: longest reply, in tokens.
        seed: the same seed and request give the same reply.
        logit_bias: token id -> what is added to its logit.
        stop: texts that end the reply, and are not part of it.
        top_logprobs: how many tokens beside the chosen one get a log-probability; None: no
            log-probabilities.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0
    frequency_penalty: float = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, in nats, before temperature, penalties and bias."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens


def defaults(generation_config: Any) -> dict[str, Any]:
    """Sampling where a request says nothing: the model's own, or that of `rlhf chat`."""
    own = {name: getattr(generation_config, name, None) for name in OWN}
    return own if generation_config.do_sample else {**own, **Sampling().options(), "min_p": None}


class Sampler:
    """Draws the tokens of one row.

    Args:
        default: see `defaults`.
        choice: number of the reply among those to the same request.
    """

    def __init__(self, options: Options, default: dict[str, Any], choice: int = 0) -> None:
        self.options = options
        given = options.temperature
        temperature = default.get("temperature") if given is None else given
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.greedy = self.temperature < COLDEST
        seed = None if options.seed is None else [options.seed % 2**64, choice]
        self.random = np.random.default_rng(seed)
        self.counts: dict[int, int] = {}  # of the reply's tokens
        penalty = default.get("repetition_penalty") or 1.0
        self.before = LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []
        )
        top_p = default.get("top_p") if options.top_p is None else options.top_p
        warpers: list[Any] = []
        if top_k := default.get("top_k"):
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p := default.get("min_p"):
            warpers.append(MinPLogitsWarper(min_p))
        self.after = LogitsProcessorList([] if self.greedy else warpers)

    @property
    def edits(self) -> bool:
        """Whether logits are changed before the temperature."""
        options = self.options
        penalties = options.presence_penalty or options.frequency_penalty
        return bool(self.before or options.logit_bias or (penalties and self.counts))

    def edited(self, seen: Sequence[int], logits: Tensor) -> Tensor:
        """Logits (1,V) with penalties and bias.

        The presence penalty is subtracted once for each token that the reply has, the frequency
        penalty as often as it has it (OpenAI, API reference). seen: tokens of prompt and reply.
        """
        logits = self.before(torch.tensor([seen], device=logits.device), logits.clone())
        changes = dict(self.options.logit_bias)
        for token, count in self.counts.items():
            penalty = self.options.presence_penalty + count * self.options.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        tokens = torch.tensor(list(changes), dtype=torch.long, device=logits.device)
        logits[0, tokens] += torch.tensor(list(changes.values()), device=logits.device)
        return logits

    def add(self, token: int) -> None:
        """Count a token of the reply."""
        self.counts[token] = self.counts.get(token, 0) + 1


def draw(
    logits: Tensor, samplers: Sequence[Sampler], seen: Callable[[int], Sequence[int]]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each row.

    Args:
        logits: (b,V) fp32. samplers: b. seen: tokens of prompt and reply of a
            row.

    Returns:
        b token ids, and the log-probabilities of the rows that want them.
    """
    raw, logits = logits, logits.clone()
    for i, sampler in enumerate(samplers):
        if sampler.edits:
            logits[i] = sampler.edited(seen(i), logits[i : i + 1])[0]
    tokens = logits.argmax(dim=1)  # (b,)
    rows = [i for i, sampler in enumerate(samplers) if not sampler.greedy]
    if rows:
        heat = torch.tensor([samplers[i].temperature for i in rows], device=logits.device)
        warm = logits[rows] / heat.unsqueeze(1)
        for j, i in enumerate(rows):
            if samplers[i].after:
                warm[j] = samplers[i].after(None, warm[j : j + 1])[0]
        numbers = torch.tensor([samplers[i].random.random() for i in rows], dtype=torch.float64)
        tokens[rows] = sample_inverse_cdf(warm, numbers.to(logits.device))[0]
    chosen = tokens.tolist()
    for sampler, token in zip(samplers, chosen, strict=True):
        sampler.add(token)
    wanted = [s.options.top_logprobs for s in samplers]
    return chosen, [
        None if top is None else _logprob(raw[i], chosen[i], top) for i, top in enumerate(wanted)
    ]


def _logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Log-probability of one token, and of the `top` likeliest; logits (V,)."""
    logprobs = torch.log_softmax(logits.double(), dim=0)
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), likeliest)
