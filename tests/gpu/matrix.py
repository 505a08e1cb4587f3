"""Which stages run: every algorithm, and each pair of what may matter together at least once."""

from __future__ import annotations

from tests.gpu.cases import ALGORITHMS, Case

CASES = [
    *(Case(name) for name in ALGORITHMS),
]
