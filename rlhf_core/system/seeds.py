"""Seeds derived from other numbers."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from any number of integers; equal parts give equal seeds."""
    state = np.random.SeedSequence([p & 0xFFFFFFFF for p in parts]).generate_state(2, np.uint32)
    return int(state[0]) << 31 ^ int(state[1])
