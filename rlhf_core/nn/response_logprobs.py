"""Log-probabilities of tokens under a causal language model, without the (N,V) logits.

The vocabulary head takes a fifth to a quarter of a training step and most of its memory. So logits
are computed in chunks, and only at positions that predict a token of the loss. If there are many,
the backward pass recomputes them; if the head is frozen, the forward pass computes the gradient.

N positions, d hidden size, V vocabulary, B sequences, S positions of a sequence, T of them at its
end the response. Log-probabilities are in nats, of logits divided by the temperature.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn.backbone import accepted, backbone_hidden, causal_lm, mask_and_positions
from rlhf_core.nn.chunked_logprobs import check_temperature, token_logprobs
from rlhf_core.nn.padding import TokenIndex, check_first_column, flat_indices, put, take
from rlhf_core.nn.vocabulary_head import Head, lm_head


@overload
def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    temperature: float = ...,
    *,
    index: TokenIndex | None = ...,
    chunk: int | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    temperature: float = ...,
    *,
    index: TokenIndex | None = ...,
    chunk: int | None = ...,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    temperature: float = 1.0,
    *,
    index: TokenIndex | None = None,
    chunk: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every response token; logits only at the positions that predict one.

    Args:
        model: a transformers causal LM, unwrapped (see ``backbone_hidden``).
        input_ids, attention_mask: (B,S). position_ids: (B,S), or None to follow the mask.
            Without a mask rows are packed, see ``backbone_hidden``.
        response_mask: (B,T) bool over the last T columns of ``input_ids``, True where a token's
            log-probability is wanted. T = S is allowed, but nothing predicts the first column.
        temperature: the logits are divided by it, as in sampling.
        index: of right-padded rows and a response_mask with T = S. Without it the masks are read,
            for which the host waits where they lie on a GPU.
        entropy: also return the entropy of the distribution at each of those positions.

    Returns:
        logprobs (B,T) in nats, 0 where the mask is False (and entropies (B,T)).

    Raises:
        ValueError: the mask is wider than the sequence, not bool, or asks for the first column.
    """
    (rows, length), width = input_ids.shape, response_mask.shape[1]
    if response_mask.dtype != torch.bool or response_mask.shape[0] != rows or width > length:
        raise ValueError(
            f"needed a bool response_mask ({rows},T) with T <= {length}, "
            f"found {response_mask.dtype} {tuple(response_mask.shape)}"
        )
    check_temperature(temperature)
    head, states, at, targets = predicting(
        model, input_ids, attention_mask, position_ids, response_mask, index
    )
    if head is None:
        logp = torch.log_softmax(states / temperature, dim=-1)  # (N,V)
        flat = logp.gather(1, targets.unsqueeze(1)).squeeze(1)  # (N,)
        flat_entropy = -(logp.exp() * logp).sum(dim=1)  # (N,)
    else:
        flat, flat_entropy = _apply_head(head, states, targets, temperature, chunk, entropy)
    logprobs = put(flat, at, rows, width)  # (B,T)
    return (logprobs, put(flat_entropy, at, rows, width)) if entropy else logprobs


class Predicting(NamedTuple):
    """The positions that predict N tokens."""

    head: Head | None  # None: the model's own forward makes its logits
    states: Tensor  # (N,d) hidden states, or (N,V) logits without a head
    at: Tensor  # (N,) flat indices of the tokens in the response mask
    targets: Tensor  # (N,) the tokens


def predicting(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    index: TokenIndex | None = None,
) -> Predicting:
    """What a model computes of the tokens in a mask before its vocabulary head is applied.

    Args: see `response_logprobs`.
    """
    at, tokens = _find(response_mask, input_ids.shape[1], index)  # (N,) each
    targets = input_ids.flatten()[tokens]  # (N,)
    before = tokens - 1  # (N,) the position before, in the same row
    head = lm_head(model)
    if head is None:
        logits = _full_logits(model, input_ids, attention_mask, position_ids)  # (B,S,V)
        return Predicting(None, take(logits, before), at, targets)
    hidden = backbone_hidden(model, input_ids, attention_mask, position_ids, index)  # (B,S,d)
    return Predicting(head, take(hidden, before), at, targets)


def _find(response_mask: Tensor, length: int, index: TokenIndex | None) -> tuple[Tensor, Tensor]:
    """Flat indices (N,) of the wanted tokens: into the response mask (B,T), and into (B,S)."""
    width = response_mask.shape[1]
    if index is not None:
        assert index.loss is not None and width == length, "an index of other rows"
        return index.loss, index.loss
    if width == length:
        check_first_column(response_mask)
    at = flat_indices(response_mask)
    return at, at + (at // max(width, 1) + 1) * (length - width)


def _apply_head(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    chunk: int | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "bias": head.bias,
        "temperature": temperature,
        "scale": head.scale,
        "softcap": head.softcap,
        "chunk": chunk,
    }
    if entropy:
        return token_logprobs(hidden, head.weight, targets, entropy=True, **options)
    flat = token_logprobs(hidden, head.weight, targets, **options)
    return flat, flat


def _full_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Logits (B,S,V) from the model's own forward, where ``lm_head`` is None."""
    lm = causal_lm(model)
    mask, position_ids = mask_and_positions(attention_mask, position_ids)
    output = lm(
        input_ids=input_ids,
        attention_mask=mask,
        use_cache=False,
        **accepted(lm.forward, position_ids=position_ids),
    )
    return upcast(output.logits)
