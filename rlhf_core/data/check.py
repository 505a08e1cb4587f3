"""Checks a data source before a run starts, by reading its first rows. Imports no torch."""

from __future__ import annotations

import itertools
from collections import Counter

from rlhf_core.data.dataset.carried import carried, carried_values
from rlhf_core.data.rows.columns import Rules
from rlhf_core.data.rows.detect import find_format
from rlhf_core.data.rows.formats import normalise
from rlhf_core.data.rows.row import SKIP_HINT, BadRow
from rlhf_core.data.sources.hub import hub_problem
from rlhf_core.data.sources.kind import source_kind
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import RLHFError
from rlhf_core.jobs import DataSettings, Purpose
from rlhf_core.store import Store

ROWS_CHECKED = 100


def check_source(
    settings: DataSettings, purpose: Purpose | None = None, store: Store | None = None
) -> list[str]:
    """Problems found in the first ROWS_CHECKED rows of a data source, one text each.

    Args:
        purpose: what the rows are for; None checks only that they can be read.
        store: holds the votes and thumbs; None: the store of the environment.
    """
    rows = open_rows(settings, store)
    try:
        if source_kind(settings.source) == "hub" and (problem := hub_problem(settings)):
            return [problem]
        rows, format = find_format(rows, settings, purpose)
        rules = Rules.of(settings, purpose or "prompts", Counter())
        good, bad = 0, ""
        for raw in itertools.islice(rows, ROWS_CHECKED):
            if raw.dropped:
                continue
            try:
                row = raw.columns(settings.renames)
                normalise(row, format, rules.purpose, rules)
                carried_values(row, carried(settings, rules.purpose))
                good += 1
            except BadRow as error:
                bad = bad or f"{raw.where()}: {error.message}."
                if settings.on_bad_row == "error":
                    return [f"{bad} {SKIP_HINT}"]
        if not good:
            return [f"{settings.source}: none of the first rows can be used. {bad}"]
    except RLHFError as error:
        return [str(error)]
    return []
