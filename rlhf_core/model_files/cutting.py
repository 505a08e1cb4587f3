"""Cuts a model's tensors into files, so that a stage that trains few layers changes few files.

The store keeps equal files once. The rule knows only names and shapes: each stage cuts a model in
the same way, and a file whose tensors were not trained has the same bytes as before. Files are
filled from the last layer downwards, since `trainable_layers` trains the top ones; the last norm
and the head come with them, the embeddings are last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Elements, not bytes, since one stage may save in bf16 and the next in fp32. Small layers share a
# file: SmolLM2-135M has 11 files, a model of 70B parameters 82.
SMALLEST, LARGEST = 2**23, 2**30
_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDINGS = re.compile(r"embed(?!_out)|\bwte\b|\bwpe\b")


def cut(sizes: Mapping[str, int], smallest: int = SMALLEST) -> list[list[str]]:
    """The tensor names of each file, embeddings first.

    Args:
        sizes: elements of each tensor by its name in the file.
        smallest: elements below which a file takes the next layer too.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for layer in _layers(sizes):
        if filled >= smallest:
            files.append([])
            filled = 0
        for name in layer:
            if files[-1] and filled + sizes[name] > LARGEST:
                files.append([])
                filled = 0
            files[-1].append(name)
            filled += sizes[name]
    if len(files) > 1 and filled < smallest:
        rest = files.pop()
        files[-1] += rest
    return [sorted(names) for names in reversed(files)]


def _layers(names: Mapping[str, int]) -> list[list[str]]:
    """Norm and head, the layers from the last to the first, and the embeddings."""
    layers: dict[float, list[str]] = {}
    for name in sorted(names):
        found = _LAYER.search(f".{name}")
        depth = float(found[1]) if found else -1.0 if _EMBEDDINGS.search(name) else float("inf")
        layers.setdefault(depth, []).append(name)
    return [layers[depth] for depth in sorted(layers, reverse=True)]
