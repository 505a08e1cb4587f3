"""The state of a strategy in a folder, as a checkpoint has it."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.training.sharding.parts import (
    Saved,
    index_parts,
    merge,
    to_host,
    to_json,
    write_parts,
)
from rlhf_core.training.stored_checkpoints import INDEX, open_saved
from rlhf_core.training.strategy import Strategy


def save(strategy: Strategy, folder: Path) -> Saved:
    """Every rank calls."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = to_host(strategy.state())
    file = folder / f"part-{strategy.rank}.safetensors"
    write_parts(parts, file)
    found = strategy.group.gather(index_parts(parts, file.name))
    if strategy.rank == 0:
        (folder / INDEX).write_text(json.dumps(to_json(merge(found))))
    strategy.group.barrier()
    return open_saved(folder)
