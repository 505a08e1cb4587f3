"""Keys and values of a decoding batch, in memory that is allocated once.

transformers' dynamic cache copies all that it holds with every token; here a token's keys and
values are written into a buffer. What the model sees are views of the filled part.

b rows, h key-value heads, P+T positions, k size of a head.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_core.nn.backbone import accepted, backbone
from rlhf_core.nn.fast_paths import FastPath, Pairs, Unsuited
from rlhf_core.nn.probe_model import trial_rows

if TYPE_CHECKING:
    DynamicLayer: Any = object
else:
    try:
        from transformers.cache_utils import DynamicLayer
    except ImportError:  # transformers before 4.54: a cache has no layers
        DynamicLayer = None

TRIAL_STEPS = 2  # tokens that a trial decodes


def dynamic_cache(lm: Any, positions: int = 0) -> Any:
    """transformers' own cache for a model; from 4.54 on, its config says which layers have a
    window. Its size is not needed ahead."""
    return DynamicCache(**accepted(DynamicCache.__init__, config=lm.config))


def new_cache(lm: Any, positions: int) -> Any:
    """A cache for a model's `past_key_values`.

    Args:
        lm: a transformers causal LM. positions: P+T, the most that a row will have.
    """
    cache = dynamic_cache(lm)
    return with_buffers(cache, positions) if is_used(lm) else cache


def is_used(lm: Any) -> bool:
    """Whether a model's cache is allocated once."""
    return PATH.works(lm)


def with_buffers(cache: Any, positions: int) -> Any:
    """The same cache with buffers for `positions` positions; layers with a window stay as they are.

    Raises:
        Unsuited: transformers is older than 4.54.
    """
    if DynamicLayer is None or not hasattr(cache, "layers"):
        raise Unsuited("transformers before 4.54 has no layers in its cache")
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = buffered = PreallocatedLayer(positions)
            if layer.keys is not None:
                buffered.update(layer.keys, layer.values)
    return cache


class PreallocatedLayer(DynamicLayer or object):  # type: ignore[misc]
    """A dynamic layer with a buffer for all positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.buffers: list[Tensor] = []  # keys and values, (b,h,P+T,k) each
        self.filled = 0

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write keys and values (b,h,n,k) of n new positions; returns all up to them."""
        if not self.buffers:
            self.buffers = [self._buffer_for(x) for x in (keys, values)]
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        end = self.filled + keys.shape[2]
        assert end <= self.positions, f"{end} positions for {self.positions}"
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.filled : end] = new
        self.filled = end
        self._show()
        return self.keys, self.values

    def _buffer_for(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.positions, x.shape[3])
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows (ascending): they move to the front, and nothing else is copied. Where
        there are to be more rows than before, they get new buffers."""
        count = len(indices)
        for i, buffer in enumerate(self.buffers):
            kept = buffer[indices, :, : self.filled]
            self.buffers[i] = buffer[:count] if count <= len(buffer) else self._buffer_for(kept)
            self.buffers[i][:, :, : self.filled] = kept
        self._show()


def read_prompts(lm: Any) -> Any:
    """transformers' own cache after the prompts of a trial, left-padded rows of usual lengths."""
    ids, mask = trial_rows(lm, left=True)
    cache = dynamic_cache(lm)
    backbone(lm)(
        input_ids=ids[:, :-TRIAL_STEPS], attention_mask=mask[:, :-TRIAL_STEPS].long(),
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    return cache


def decode_after(lm: Any, cache: Any) -> Tensor:
    """Hidden states (4+2,1,d) of two tokens behind `read_prompts`: one after each of four rows, of
    which two are the same, then one after each of the two rows that are kept."""
    ids, mask = trial_rows(lm, left=True)
    hidden, length = [], ids.shape[1] - TRIAL_STEPS
    for rows in ([0, 1, 1, 2], [0, 3]):
        kept = torch.tensor(rows, device=ids.device)
        ids, mask = ids[kept], mask[kept].long()
        cache.batch_select_indices(kept)
        output = backbone(lm)(
            input_ids=ids[:, length : length + 1], attention_mask=mask[:, : length + 1],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        hidden.append(output[0])
        length += 1
    return torch.cat(hidden)


def _trial(lm: Any) -> Pairs:
    cache = read_prompts(lm)
    positions = trial_rows(lm)[0].shape[1]
    buffered = with_buffers(copy.deepcopy(cache), positions)
    return [(decode_after(lm, buffered), decode_after(lm, cache))]


PATH = FastPath(
    "key-value cache allocated once",
    "a copy of the whole cache with every decoded token",
    _trial,
)
