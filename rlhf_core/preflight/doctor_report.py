"""What `rlhf doctor` finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_core.preflight.fitting import Fit


@dataclass(frozen=True)
class Finding:
    """One line of the report. A "bad" finding makes the exit code 1."""

    subject: str
    state: Literal["ok", "note", "bad"]
    text: str


@dataclass(frozen=True)
class Report:
    """What was found out.

    Attributes:
        findings: of this machine; empty where other GPUs were asked about.
        available: bytes per rank. length: tokens of a sequence.
        fits: stage -> the ways to train, each without and with gradient checkpointing.
    """

    findings: list[Finding]
    model: str
    parameters: int
    fits: dict[str, list[Fit]]
    available: int
    device: Literal["cpu", "cuda"]
    ranks: int
    length: int

    @property
    def sound(self) -> bool:
        return all(finding.state != "bad" for finding in self.findings)
