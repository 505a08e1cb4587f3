"""Rows that are decoded together, of which some may join and leave between two tokens.

transformers' own continuous batching has fewer parameters, and on a CPU a quarter of the speed at
50 rows (docs/serving.md). A batch here is a rectangle of
keys and values with the rows aligned at their last tokens, in memory that is allocated ahead.

b rows, h key-value heads, e size of a head, W columns that are filled, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn import small_batch_linear
from rlhf_core.nn.backbone import accepted, causal_lm, position_ids_from_mask
from rlhf_core.nn.fast_paths import FastPath, Pairs, Unsuited
from rlhf_core.nn.probe_model import trial_rows
from rlhf_core.rollout import grouped_attention
from rlhf_core.rollout.kv_cache import dynamic_cache

AHEAD = 128  # columns that are allocated ahead
MIN_ROWS = 8  # rows that are allocated at least


class _Layer(DynamicLayer):
    """Keys and values of one layer, the views of two buffers (rows, h, columns, e)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = [keys, values]
        self.rows = self.filled = 0

    def show(self, rows: int, filled: int) -> None:
        """The model sees so many rows and columns."""
        self.rows, self.filled = rows, filled
        self.keys, self.values = (buffer[:rows, :, :filled] for buffer in self.buffers)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write keys and values (b,h,n,e) of n new columns; returns all up to them."""
        end = self.filled + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[: self.rows, :, self.filled : end] = new
        self.show(self.rows, end)
        return self.keys, self.values


class Batch:
    """A causal LM and the rows that it decodes. Not thread-safe; in `decoding` only.

    Attributes:
        lengths: tokens of each row that the cache holds.
        joins: rows may join others; without it, one row at a time.
    """

    def __init__(self, model: Any, joins: bool | None = None) -> None:
        self.lm = causal_lm(model)
        self.device = next(model.parameters()).device
        self.lengths: list[int] = []
        self._cache: Any = None
        self._takes_positions = "position_ids" in accepted(self.lm.forward, position_ids=None)
        self._keep = accepted(self.lm.forward, logits_to_keep=1)
        self.joins = JOINING.works(self.lm) if joins is None else joins

    @property
    def position_bytes(self) -> int:
        """Bytes of the keys and values of one token; 0 as long as no row has been read."""
        layers = getattr(self._cache, "layers", [])
        found = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.element_size() * x.shape[1] * x.shape[-1] for x in found)

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts of new rows, behind the others; logits (n,V) after each."""
        assert self.joins or (len(prompts) == 1 and not self.lengths)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = torch.tensor(prompt)
        lengths = [len(prompt) for prompt in prompts]
        cache = dynamic_cache(self.lm)
        logits = self._forward(ids, lengths, width, cache)
        if self.joins:
            self._take(cache, width)
        else:
            self._cache = cache
        self.lengths += lengths
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits (b,V) after one more token of each row."""
        filled = self.lengths[0]
        if self.joins:
            layer = self._cache.layers[0]
            if layer.filled == layer.buffers[0].shape[2]:
                self._rebuild(len(self.lengths), max(self.lengths))
            filled = self._cache.layers[0].filled
        self.lengths = [length + 1 for length in self.lengths]
        ids = torch.tensor(tokens).unsqueeze(1)  # (b,1)
        return self._forward(ids, self.lengths, filled + 1, self._cache)

    def leave(self, gone: Sequence[int]) -> list[int]:
        """Remove rows; returns the new order of those that stay, as old indices. The last rows
        move into the holes."""
        count = len(self.lengths) - len(gone)
        holes = [i for i in gone if i < count]
        last = [i for i in range(count, len(self.lengths)) if i not in set(gone)]
        order = list(range(count))
        for hole, row in zip(holes, last, strict=True):
            order[hole] = row
        self.lengths = [self.lengths[i] for i in order]
        if not order:
            self._cache = None
        elif self.joins:
            for layer in self._cache.layers:
                for buffer in layer.buffers:
                    buffer[holes, :, : layer.filled] = buffer[last, :, : layer.filled]
                layer.show(count, layer.filled)
        return order

    def _forward(self, ids: Tensor, lengths: Sequence[int], width: int, cache: Any) -> Tensor:
        """Logits (b,V) fp32 after ids (b,n), the last of rows with these lengths."""
        first = width - torch.tensor(lengths).unsqueeze(1)  # (b,1)
        mask = (torch.arange(width) >= first).long()  # (b,W)
        positions = position_ids_from_mask(mask)[:, -ids.shape[1] :]  # (b,n)
        options = {"position_ids": positions.to(self.device)} if self._takes_positions else {}
        output = self.lm(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device),
            past_key_values=cache, use_cache=True, **options, **self._keep,
        )  # fmt: skip
        return upcast(output.logits[:, -1])

    def _take(self, cache: Any, width: int) -> None:
        """Put the rows of a new cache, of so many columns, behind those that are there."""
        old, new = len(self.lengths), cache.layers[0].keys.shape[0]
        layer = self._cache.layers[0] if self._cache is not None else None
        rows, _, columns, _ = layer.buffers[0].shape if layer else (0, 0, 0, 0)
        if layer is None or old + new > rows or layer.filled < width or layer.filled >= columns:
            self._rebuild(old + new, max([width, *self.lengths]), cache)
        for layer, joining in zip(self._cache.layers, cache.layers, strict=True):
            filled = layer.filled
            for buffer, x in zip(layer.buffers, (joining.keys, joining.values), strict=True):
                buffer[old : old + new, :, : filled - width] = 0  # not what was there: may be NaN
                buffer[old : old + new, :, filled - width : filled] = x
            layer.show(old + new, filled)

    def _rebuild(self, rows: int, width: int, like: Any = None) -> None:
        """New buffers with room for so many rows, and without columns that no row needs.

        Args:
            width: columns that are filled afterwards. like: a cache of the model, for the shapes.
        """
        old = self._cache
        room = MIN_ROWS
        while room < rows:
            room *= 2
        self._cache = DynamicCache()
        self._cache.layers = []
        for number, layer in enumerate((like or old).layers):
            shape = (room, layer.keys.shape[1], width + AHEAD)
            made = _Layer(*(x.new_zeros(*shape, x.shape[3]) for x in (layer.keys, layer.values)))
            count = len(self.lengths)
            if count:
                needed = max(self.lengths)
                before = old.layers[number]
                for buffer, x in zip(made.buffers, (before.keys, before.values), strict=True):
                    buffer[:count, :, width - needed : width] = x[:count, :, -needed:]
            made.show(count, width)
            self._cache.layers.append(made)


@contextlib.contextmanager
def decoding(batch: Batch) -> Iterator[None]:
    """The block in which a batch decodes: no gradients, and the fast paths of this project."""
    lm = batch.lm
    with grouped_attention.installed(lm), small_batch_linear.installed(lm), torch.inference_mode():
        yield


def _trial(lm: Any) -> Pairs:
    """Rows that join, wait and leave, against the same rows alone."""
    if any(type(layer) is not DynamicLayer for layer in dynamic_cache(lm).layers):
        raise Unsuited("its layers keep only a window, or states instead of keys and values")
    ids, mask = trial_rows(lm, left=True)
    rows = [ids[i][mask[i]].tolist() for i in (1, 0, 2)]  # of 72, 128 and 24 tokens
    prompts, after = [row[:-3] for row in rows], [row[-3:] for row in rows]
    alone = []
    for prompt, tokens in zip(prompts, after, strict=True):
        single = Batch(lm, joins=False)
        alone.append([single.join([prompt]), *(single.step([token]) for token in tokens)])
    batch = Batch(lm, joins=True)
    joined = [batch.join(prompts[:1]), batch.join(prompts[1:2])]
    joined.append(batch.step([after[0][0], after[1][0]]))
    joined.append(batch.join(prompts[2:]))
    assert batch.leave([0]) == [2, 1]
    joined.append(batch.step([after[2][0], after[1][1]]))
    plain = [
        alone[0][0], alone[1][0], torch.cat([alone[0][1], alone[1][1]]), alone[2][0],
        torch.cat([alone[2][1], alone[1][2]]),
    ]  # fmt: skip
    # logits are fp32 whatever the model computes in, which is what the tolerance goes by
    return [(x.to(lm.dtype), y.to(lm.dtype)) for x, y in zip(joined, plain, strict=True)]


JOINING = FastPath(
    "requests that join a running batch",
    "requests are answered one after another",
    _trial,
)
