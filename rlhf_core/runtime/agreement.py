"""A decision of rank 0 that all ranks of a job share, before they have a process group.

What the store holds may change between two looks: if each rank looked for itself, one could find a
result and end, and the others would wait for it in their first collective operation.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

_decisions = itertools.count()  # every rank makes the same ones, in the same order


def decided(decide: Callable[[], bool], seconds: float) -> bool:
    """What ``decide`` returns on rank 0, on every rank; it is called there only.

    Args:
        seconds: for which the other ranks wait for rank 0.

    Raises:
        DistStoreError: rank 0 did not decide in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return decide()
    key = f"rlhf/decision/{next(_decisions)}"
    store = _rendezvous(seconds)
    if os.environ["RANK"] == "0":
        store.set(key, b"yes" if decide() else b"no")
    return bool(store.get(key) == b"yes")


@functools.cache  # rank 0 may be the one that holds the values
def _rendezvous(seconds: float) -> Any:
    """The key-value store of torchrun, through which a process group is made, too."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    return next(dist.rendezvous("env://", timeout=timeout))[0]
