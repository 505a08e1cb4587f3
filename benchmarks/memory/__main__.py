"""Memory of training by simulation, beside the estimate: `make memory-table`.

Writes benchmarks/results/memory.json and the tables of docs/memory.md. `--missing` simulates what
the file lacks; `--tables` writes the tables alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict

from benchmarks.memory.cases import Case, grid
from benchmarks.memory.compare import RESULTS, rows, write_page
from benchmarks.memory.simulate import simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if not arguments.tables:
        known = dict(rows()) if arguments.missing else {}
        todo = [case for case in grid() if case not in known]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            for case, peaks in pool.imap_unordered(simulated, todo):
                known[case] = peaks
                save(known)
    write_page()


def save(known: dict[Case, dict[str, int]]) -> None:
    """Write what is known, one case a line."""
    found = [json.dumps({**asdict(c), "peaks": known[c]}) for c in grid() if c in known]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("[\n" + ",\n".join(found) + "\n]\n")


if __name__ == "__main__":
    main()
