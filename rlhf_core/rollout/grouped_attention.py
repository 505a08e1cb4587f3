"""Attention of one new token where several query heads share a key-value head.

transformers repeats keys and values for each query head of a group, which copies the whole cache
with every token of a batch that has a mask. Here a group's queries are the rows of one product
with the keys that they share: the same numbers, nothing is copied.

b rows, H query heads in groups of G, e size of a head, S positions so far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_core.nn.backbone import backbone
from rlhf_core.nn.probe_model import once, same_numbers
from rlhf_core.rollout.kv_cache import new_cache

NAME = "rlhf_decode"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (b,H,1,e), key, value (b,H/G,S,e), mask (b,1,1,S) or None -> (b,1,H,e).

    More than one new token, and anything else than a mask of rows, is left to transformers.
    """
    (rows, heads, new, size), shared = query.shape, key.shape[1]
    by_row = attention_mask is None or tuple(attention_mask.shape[1:3]) == (1, 1)
    bias, cache = options.get("position_bias"), options.get("cache")
    if new > 1 or shared == heads or not by_row or bias is not None or cache is not None:
        return sdpa_attention_forward(  # type: ignore[return-value]
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    grouped = query.view(rows, shared, heads // shared, size)
    found = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, _attention)
try:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError:  # transformers before 4.53
    _has_masks = False
else:
    AttentionMaskInterface.register(NAME, sdpa_mask)
    _has_masks = True


@contextlib.contextmanager
def shared_heads(lm: Any) -> Iterator[None]:
    """Within it, a model whose query heads share key-value heads decodes without repeating them.

    Args:
        lm: a transformers causal LM. One that computes otherwise stays as it is.
    """
    config = lm.config
    before = config._attn_implementation
    if before != "sdpa" or not _works(lm):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@once
def _works(lm: Any) -> bool:
    """Whether the numbers are the same; tried out on a token after two rows, one of them padded."""
    config = lm.config
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if not _has_masks or not shared or shared == heads:
        return False
    before = config._attn_implementation
    try:
        want = _two_steps(lm)
        config._attn_implementation = NAME
        found = _two_steps(lm)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return False
    finally:
        config._attn_implementation = before
    return same_numbers(found, want)


def _two_steps(lm: Any) -> Tensor:
    """Hidden states (2,1,d) of a token behind a row of three and a row of two."""
    base = backbone(lm)
    size = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=next(base.parameters()).device).view(2, 4).remainder(size)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    cache = new_cache(lm.config, 4)
    base(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache, use_cache=True)
    return base(
        input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache, use_cache=True
    )[0]  # fmt: skip
