"""Right-padded rows through a transformers model without their padding.

Norms, projections and MLPs look at single tokens: they get the real tokens of all rows, one after
another, as one row. Attention needs the rows: there queries, keys and values are put back into
their places, and causal attention runs as ever, in which no real token sees the padding behind it.

B rows, S positions, N real tokens, H heads, e size of a head, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_core.nn.probe_model import once, same_numbers

NAME = "rlhf_unpadded"
LEAST = 0.03  # share of padding below which rows stay as they are
# Of a padded token only attention is computed: what that costs beside a real one.
ATTENTION_SHARE = 0.25


class _Put(torch.autograd.Function):
    """(N,...) -> (B*S,...), zeros at padding; backward the other way."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, indices: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(indices)
        return tokens.new_zeros(size, *tokens.shape[1:]).index_copy_(0, indices, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Take(torch.autograd.Function):
    """(B*S,...) -> (N,...); backward the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.size = rows.shape[0]
        return rows.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape = (ctx.size, *grad.shape[1:])
        return grad.new_zeros(shape).index_copy_(0, ctx.saved_tensors[0], grad), None


class Layout(NamedTuple):
    """Where the real tokens stand: flat places (N,) in B rows of S positions."""

    indices: Tensor
    rows: int
    length: int

    def put(self, tokens: Tensor) -> Tensor:
        """(N,...) -> (B,S,...)."""
        padded = cast(Tensor, _Put.apply(tokens, self.indices, self.rows * self.length))
        return padded.view(self.rows, self.length, *tokens.shape[1:])

    def take(self, rows: Tensor) -> Tensor:
        """(B,S,...) -> (N,...)."""
        return cast(Tensor, _Take.apply(rows.flatten(0, 1), self.indices))


_layout: Layout | None = None  # of the forward pass that is going on


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row by itself: query, key, value (1,H,N,e) -> (1,N,H,e)."""
    layout = _layout
    assert layout is not None and attention_mask is None
    rows = [layout.put(x.squeeze(0).transpose(0, 1)).transpose(1, 2) for x in (query, key, value)]
    found, _ = sdpa_attention_forward(module, *rows, None, **options)  # type: ignore[arg-type]
    return layout.take(found).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


def hidden_states(base: Any, input_ids: Tensor, mask: Tensor) -> Tensor | None:
    """The backbone's output (B,S,d) for right-padded rows, zeros at padding.

    Args:
        input_ids: (B,S). mask: (B,S), True at real tokens, which come first in each row.

    Returns:
        None where there is little padding, or the model is not one that can go without.
    """
    return _run(base, input_ids, mask) if leaves_out(base) and _worthwhile(mask) else None


def leaves_out(base: Any) -> bool:
    """Whether a backbone is run without padding as it is set up now.

    Not with gradient checkpointing: layers run again in the backward pass, when the layout is
    forgotten.
    """
    if getattr(base, "keeps_padding", False) or getattr(base, "is_gradient_checkpointing", False):
        return False
    return _full_attention(base) and goes_without_padding(base)


def run_alike(bases: Sequence[Any]) -> None:
    """Let backbones that go on from each other's hidden states all leave padding out, or none."""
    if not all([leaves_out(base) for base in bases]):
        for base in bases:
            base.keeps_padding = True


def _worthwhile(mask: Tensor) -> bool:
    return float(mask.sum()) <= (1 - LEAST) * mask.numel()


def _run(base: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    global _layout
    mask = mask.bool()
    rows, length = mask.shape
    indices = mask.flatten().nonzero().squeeze(1)  # (N,)
    positions = indices.remainder(length).unsqueeze(0)  # (1,N)
    config, before = base.config, base.config._attn_implementation
    _layout = Layout(indices, rows, length)
    try:
        config._attn_implementation = NAME
        output = base(
            input_ids=input_ids.flatten()[indices].unsqueeze(0),
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
        )
        return _layout.put(output[0].squeeze(0))
    finally:
        config._attn_implementation = before
        _layout = None


@once
def goes_without_padding(base: Any) -> bool:
    """Whether a backbone's numbers are the same without padding."""
    size = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(15, device=next(base.parameters()).device).view(3, 5).remainder(size)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = False
    try:
        want = base(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0][mask]
        found = _run(base, ids, mask)[mask]
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError):
        return False  # a model that takes no positions, or attends in a way of its own
    return same_numbers(found, want)


def _full_attention(base: Any) -> bool:
    """Whether attention is torch's own, full and causal: a window of positions would be lost."""
    config = getattr(base, "config", None)
    if config is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return kinds == {"full_attention"} and not any(windows)
