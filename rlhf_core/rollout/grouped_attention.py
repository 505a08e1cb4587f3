"""Attention of one new token where several query heads share a key-value head.

transformers repeats keys and values for each query head of a group, which copies the whole cache
with every token of a batch that has a mask. Here a group's queries are the rows of one product
with the keys that they share: the same numbers, and nothing is copied.

b rows, H query heads in groups of G, e size of a head, S positions so far.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_core.nn.fast_paths import FastPath, Pairs, Unsuited, patched, switched_on
from rlhf_core.rollout.kv_cache import decode_after, read_prompts

ATTENTION = "rlhf_decode"  # name of `_attention` in transformers' registry


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

    More than one new token, and anything but a mask of rows, is left to transformers.
    """
    (rows, heads, new, size), shared = query.shape, key.shape[1]
    by_row = attention_mask is None or tuple(attention_mask.shape[1:3]) == (1, 1)
    bias, cache = options.get("position_bias"), options.get("cache")
    if new > 1 or shared == heads or not by_row or bias is not None or cache is not None:
        return sdpa_attention_forward(  # type: ignore[return-value]
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    grouped = query.view(rows, shared, heads // shared, size)
    output = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, _attention)
try:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError:  # transformers before 4.53
    _has_masks = False
else:
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    _has_masks = True


@contextlib.contextmanager
def installed(lm: Any) -> Iterator[None]:
    """Inside the block, a causal LM for which `is_used` decodes without repeating heads."""
    with patched(*[(lm.config, "_attn_implementation", ATTENTION)] if is_used(lm) else []):
        yield


def is_used(lm: Any) -> bool:
    """Whether a model has query heads in groups, and attention that can be replaced."""
    if not _has_groups(lm.config) or not switched_on():
        return False
    if lm.config._attn_implementation not in ("sdpa", ATTENTION):
        PATH.log_off(lm, f"its attention is {lm.config._attn_implementation}, not sdpa")
        return False
    return PATH.works(lm)


def _has_groups(config: Any) -> bool:
    shared = getattr(config, "num_key_value_heads", None)
    return bool(shared) and shared != getattr(config, "num_attention_heads", None)


def _trial(lm: Any) -> Pairs:
    if not _has_masks:
        raise Unsuited("transformers before 4.53 makes no mask for it")
    cache = read_prompts(lm)
    plain = decode_after(lm, copy.deepcopy(cache))
    with patched((lm.config, "_attn_implementation", ATTENTION)):
        fast = decode_after(lm, cache)
    return [(fast, plain)]


PATH = FastPath(
    "query heads in groups while decoding",
    "a copy of keys and values for each query head with every decoded token",
    _trial,
)
