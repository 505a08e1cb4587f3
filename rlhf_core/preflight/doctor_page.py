"""How `rlhf doctor` shows its report."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_core.preflight.doctor_report import Report
from rlhf_core.preflight.fitting import ADAPTERS, MOST_ROWS, Fit
from rlhf_core.preflight.memory import GIB
from rlhf_core.system.printable import printable

_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]BAD[/]"}


def show(found: Report, console: Console) -> None:
    """Print the report, in 100 columns."""
    if found.findings:
        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in found.findings:
            table.add_row(_MARKS[finding.state], finding.subject, escape(printable(finding.text)))
        console.print(table)
        console.print()
    unit = ("GPU" if found.device == "cuda" else "CPU rank") + ("s" if found.ranks > 1 else "")
    model = escape(printable(found.model))
    lines = [
        f"[bold]{model}[/], {found.parameters:,} parameters, on {found.ranks} {unit} "
        f"of {found.available / GIB:.3g} GiB: bf16, sequences of {found.length:,} tokens.",
        "The largest micro_batch_size that fits, up to "
        f"{MOST_ROWS} (rows per rank; in the reward stage a row is a pair), or in "
        "parentheses the GiB that one row needs. saving: with gradient_checkpointing, a third more "
        "time.",
        _table(found),
        *_notes(found),
    ]
    for line in lines:
        console.print(line, highlight=False)


def _table(found: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("trained", "strategy"):
        table.add_column(f"\n{heading}", no_wrap=True)
    for title in found.fits:
        for heading in (f"{title}\nplain", "\nsaving"):
            table.add_column(heading, justify="right", no_wrap=True)
    if found.device == "cuda":
        table.add_column("host\nGiB", justify="right", no_wrap=True)
    stages = list(found.fits.values())
    before = None
    for index in range(0, len(stages[0]), 2):
        ways = [fit for fits in stages for fit in fits[index : index + 2]]
        first = ways[0]
        cells = [_cell(fit) for fit in ways]
        if found.device == "cuda":
            host = [fit.need.host * found.ranks + fit.need.host_once for fit in ways if fit.rows]
            cells.append(f"{max(host) / GIB:.0f}" if host else "")
        if before not in (None, first.tuning):
            table.add_section()
        shown = "all" if first.tuning == "all weights" else first.tuning
        table.add_row("" if before == first.tuning else shown, first.strategy, *cells)
        before = first.tuning
    return table


def _cell(fit: Fit) -> str:
    if fit.rows:
        return f"[green]{fit.rows}[/]"
    return f"[red]({fit.need.total / GIB:.0f})[/]"


def _notes(found: Report) -> list[str]:
    """How to set what was found, and what the numbers leave out."""
    lines = []
    best = next((fit for fit in found.fits["SFT"] if fit.rows), None)
    if best is not None:
        place = f"ranks: {found.ranks}, strategy: {best.strategy}, micro_batch_size: {best.rows}"
        saving = ", gradient_checkpointing: true" if best.checkpointing else ""
        lines.append(f"The first that fits for SFT: resources: {{{place}{saving}}}")
    lines.append(
        f"LoRA: sft.lora: {{rank: {ADAPTERS.rank}}}, on all linear layers. QLoRA: with it "
        "model.quantization: nf4, which every rank holds whole."
    )
    if found.device == "cuda":
        lines.append(
            "host: main memory of all ranks together, while they load models or write a checkpoint."
        )
    lines.append(
        "These are estimates, 0.9 to 1.25 of a simulation (docs/memory.md), which leaves out "
        "fragmentation and the kernels' own memory."
    )
    return lines
