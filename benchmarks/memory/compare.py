"""The estimate of `rlhf_core.preflight.memory` beside what was simulated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.memory.cases import Case
from rlhf_core.preflight.memory import GIB, estimate

RESULTS = Path(__file__).resolve().parents[1] / "results" / "memory.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"
NOT_SIMULATED = ("process", "rollout")  # parts of the estimate
# Columns of the table: heading, and what a case of it has.
COLUMNS: dict[str, Mapping[str, Any]] = {
    "ddp": {"strategy": "ddp", "tuning": "full"},
    "zero1, 8": {"strategy": "zero1", "tuning": "full"},
    "zero2, 8": {"strategy": "zero2", "tuning": "full"},
    "fsdp2, 8": {"strategy": "fsdp2", "ranks": 8, "tuning": "full"},
    "fsdp2, 64": {"strategy": "fsdp2", "ranks": 64, "tuning": "full"},
    "LoRA, ddp": {"strategy": "ddp", "tuning": "lora"},
    "LoRA, fsdp2, 8": {"strategy": "fsdp2", "tuning": "lora"},
    "QLoRA": {"tuning": "qlora"},
}


def rows(path: Path = RESULTS) -> Iterator[tuple[Case, dict[str, int]]]:
    """Cases and their simulated peaks: phase -> bytes."""
    names = [field.name for field in fields(Case)]
    for row in json.loads(path.read_text()):
        yield Case(**{name: row[name] for name in names}), row["peaks"]


def estimated(case: Case) -> int:
    """The estimate without what is not simulated, in bytes."""
    found = estimate(
        case.config, case.settings(), case.resources(), case.stage, max_length=case.length,
        quantization="nf4" if case.tuning == "qlora" else None,
    )  # fmt: skip
    return found.total - sum(found.parts.get(name, 0) for name in NOT_SIMULATED)


def table(found: list[tuple[Case, dict[str, int]]]) -> str:
    """Markdown: simulated GiB of SFT, one row of 2,048 tokens; the estimate as a share of it."""
    lines = [
        f"| model | saving | {' | '.join(COLUMNS)} |",
        "| --- | --- |" + " --- |" * len(COLUMNS),
    ]
    chosen = [(c, p) for c, p in found if (c.stage, c.rows, c.length) == ("sft", 1, 2048)]
    for model in dict.fromkeys(case.model for case, _ in chosen):
        for saving in (False, True):
            cells = []
            for wanted in COLUMNS.values():
                case, peaks = next(
                    (c, p)
                    for c, p in chosen
                    if (c.model, c.checkpointing) == (model, saving)
                    and all(getattr(c, name) == value for name, value in wanted.items())
                )
                peak = max(peaks.values())
                cells.append(f"{peak / GIB:.1f} ({estimated(case) / peak:.2f})")
            lines.append(f"| {model} | {'yes' if saving else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(found: list[tuple[Case, dict[str, int]]]) -> str:
    """Markdown: of each stage the number of cases, and the least and greatest share."""
    lines = ["| stage | cases | least | median | greatest |", "| --- | --- | --- | --- | --- |"]
    for stage in dict.fromkeys(case.stage for case, _ in found):
        shares = sorted(estimated(c) / max(p.values()) for c, p in found if c.stage == stage)
        cells = f"{shares[0]:.2f} | {shares[len(shares) // 2]:.2f} | {shares[-1]:.2f}"
        lines.append(f"| {stage} | {len(shares)} | {cells} |")
    return "\n".join(lines)


def write_page(page: Path = PAGE) -> None:
    """Put both tables between the marks of the page."""
    found = list(rows())
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{BEGIN}\n\n{table(found)}\n\n{summary(found)}\n\n{END}"
    page.write_text(before + text + after)
