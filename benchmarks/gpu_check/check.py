"""What the parts share: the device, the sizes, a store, and a place for what they find."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.sizes import CPU, GPU, Sizes

Part = Callable[["Check", dict[str, Any]], list[str]]
"""Fills in what it finds; returns the problems, one text each, none where all is well."""


class NotHere(Exception):
    """What the part measures does not exist on this device; the text says why."""


@dataclass
class Check:
    """One run of the script, or the rest of one after a part has died.

    Attributes:
        device: "cuda" or "cpu".
        folder: for the store, job folders and what the parts found.
        stages: names of the stages that the part `stages` runs; empty: all.
    """

    device: str
    folder: Path
    stages: tuple[str, ...] = ()
    saves: Callable[[], None] = field(default=lambda: None, repr=False)
    """Writes what the running part has found so far; long parts call it now and then."""

    @property
    def sizes(self) -> Sizes:
        return GPU if self.device == "cuda" else CPU

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @cached_property
    def store(self) -> Any:
        from rlhf_core.store import open_store

        os.environ["RLHF_HOME"] = str(self.folder / "home")
        return open_store(f"file://{self.folder / 'store'}")

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned, kept in a file for the worker that follows a dead one."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps(make()))
            partial.replace(path)
        return dict(json.loads(path.read_text()))

    def found(self, part: str) -> dict[str, Any]:
        """What an earlier part found; empty where it did not run."""
        path = part_file(self.folder, part)
        return dict(json.loads(path.read_text())["found"]) if path.exists() else {}


def part_file(folder: Path, part: str) -> Path:
    return folder / "parts" / f"{part}.json"


def write_part(
    folder: Path, part: str, status: str, seconds: float, found: Any, problems: list[str]
) -> None:
    """Write what is known of a part, all or nothing."""
    path = part_file(folder, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"status": status, "seconds": round(seconds, 1), "problems": problems, "found": found}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def describe(error: BaseException) -> str:
    """The innermost frames and the error, its beginning where it is long."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{frames[-3000:]}{type(error).__name__}: {str(error)[:800]}"
