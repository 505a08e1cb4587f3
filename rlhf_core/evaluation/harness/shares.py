"""How requests are distributed over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby


def distribute(
    texts: Sequence[str], ranks: int, size: int, batches: int
) -> Iterator[list[list[int]]]:
    """Positions of requests, long ones first, in pieces of one list for each rank.

    Requests with the same text (the choices of one question) stay together, up to `size` of them:
    the harness computes what they have in common once.

    Args:
        texts: first argument of each request.
        size: requests in one pass. batches: full passes of a rank in one piece, at most.
    """
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
    runs: list[list[int]] = []
    for _, same in groupby(order, key=lambda i: texts[i]):
        together = list(same)
        runs += [together[i : i + size] for i in range(0, len(together), size)]
    piece: list[list[int]] = []
    for run in runs:
        piece.append(run)
        if sum(map(len, piece)) >= ranks * size * batches:
            yield _dealt(piece, ranks)
            piece = []
    if piece:
        yield _dealt(piece, ranks)


def _dealt(runs: list[list[int]], ranks: int) -> list[list[int]]:
    return [[i for run in runs[rank::ranks] for i in run] for rank in range(ranks)]
