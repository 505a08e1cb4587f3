"""Keys and values of a decoding batch, in memory that is there from the start.

transformers' dynamic cache copies all that it holds with every token; here a token's keys and
values are written into their place. What the model sees are views of the filled part.

b rows, h key-value heads, P+T positions, k size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_core.nn.backbone import accepted


def new_cache(config: Any, positions: int) -> Any:
    """A cache for a model's `past_key_values`.

    Layers of a sliding window, and transformers before 4.54, keep transformers' own.

    Args:
        config: of the model. positions: P+T, the most that a row will have.
    """
    from transformers import DynamicCache, cache_utils

    # from transformers 4.54 on, the config tells sliding-window layers from others
    cache = DynamicCache(**accepted(DynamicCache.__init__, config=config))
    layer = getattr(cache_utils, "DynamicLayer", None)
    if layer is not None and hasattr(cache, "layers"):
        preallocated = _preallocated(layer)
        cache.layers = [preallocated(positions) if type(x) is layer else x for x in cache.layers]
    return cache


def _preallocated(layer: type) -> type:
    class PreallocatedLayer(layer):  # type: ignore[misc]
        """A dynamic layer with room for all positions."""

        def __init__(self, positions: int) -> None:
            super().__init__()
            self.positions = positions
            self.buffer: list[Tensor] = []  # keys and values, (b,h,P+T,k) each
            self.filled = 0

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.buffer:
                self.buffer = [self._buffer_for(x) for x in (keys, values)]
                self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            end = self.filled + keys.shape[2]
            assert end <= self.positions, f"{end} positions for {self.positions}"
            for buffer, new in zip(self.buffer, (keys, values), strict=True):
                buffer[:, :, self.filled : end] = new
            self.filled = end
            self._show()
            return self.keys, self.values

        def _buffer_for(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], self.positions, x.shape[3])
            return torch.empty(shape, dtype=x.dtype, device=x.device)

        def _show(self) -> None:
            self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffer)

        def batch_select_indices(self, indices: Tensor) -> None:
            """Keep these rows (ascending): they move to the front, nothing else is copied. Where
            there are to be more of them than before, they get room of their own."""
            count = len(indices)
            for i, buffer in enumerate(self.buffer):
                kept = buffer[indices, :, : self.filled]
                self.buffer[i] = buffer[:count] if count <= len(buffer) else self._buffer_for(kept)
                self.buffer[i][:, :, : self.filled] = kept
            self._show()

    return PreallocatedLayer
