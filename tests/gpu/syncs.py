"""Counts where the host waits for the GPU: each such line of `rlhf_core` with its kind.

Kinds: `item` (also `bool()`, `int()`, `float()` and `if tensor`), `tolist`, `to CPU`, `to GPU`
(without `non_blocking=True`: torch then waits for the stream), `CPU index` (an index tensor on the
CPU is copied first), `bool index`, and the operators whose result has a size that depends on data,
such as `nonzero`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

OWN = "/rlhf_core/"
UPLOAD = "to GPU"
# Operators that copy a size or a truth value to the host.
OPERATORS = {
    "_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "masked_select",
    "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique",
    "equal": "equal", "repeat_interleave": "repeat_interleave", "bincount": "bincount",
}  # fmt: skip

Key = tuple[str, str]  # "nn/padding.py:31", kind
_found: Counter[Key] = Counter()


def record(kind: str) -> None:
    """One synchronisation at the line of `rlhf_core` that is running."""
    _found[where(), kind] += 1


def where() -> str:
    """The innermost line of `rlhf_core` on the stack, as "nn/padding.py:31".

    In the backward pass of torch's own operators there is none: "elsewhere".
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if OWN in name:
            return f"{name.rpartition(OWN)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextmanager
def counted() -> Iterator[Counter[Key]]:
    """The synchronisations inside the block, filled in at its end."""
    before, found = Counter(_found), Counter[Key]()
    try:
        yield found
    finally:
        found.update(_found - before)


def table(found: Counter[Key]) -> list[str]:
    """The most frequent first, one a line."""
    order = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    return [f"{count:6d}  {line:44} {kind}" for (line, kind), count in order]
