"""The data card: how many rows were read and kept, and why the others were not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.sampling import Plan
from rlhf_core.data.overlap.result import Overlap
from rlhf_core.errors import DataError
from rlhf_core.jobs.sources import EpochSettings, Share, StoppingStrategy

MAX_LISTED = 1000  # bad rows listed one by one; the others are only counted


@dataclass
class SplitCard:
    """One split. Lengths are in tokens, prompt and (longer) reply together."""

    rows: int = 0
    prompts: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    lengths: dict[str, float] = field(default_factory=dict)
    histogram: list[dict[str, int]] = field(default_factory=list)


@dataclass
class SourceCard:
    """One source of a mixture. Rows are counted as in `DataCard`; `dropped` has also the rows that
    an earlier source has. Tokens are those of both sides."""

    name: str
    source: str = ""
    data: str = ""  # digest of the prepared source, which has its whole card
    weight: float | None = None
    share: int | None = None  # rows in an epoch, as the settings give them
    read: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    train: int = 0
    heldout: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    epoch: int | None = None  # rows in an epoch; None for pretrain, which counts packed sequences


@dataclass
class MixtureCard:
    """What a mixture is made of, and how its epochs are drawn (sampling.py)."""

    sources: list[SourceCard]
    stopping_strategy: StoppingStrategy = "all_exhausted"
    max_repeats: int = 4

    @property
    def plan(self) -> Plan:
        """The plan of the epochs."""
        shares = {s.name: Share(weight=s.weight, rows=s.share) for s in self.sources}
        return Plan(shares, self._rule)

    @property
    def _rule(self) -> EpochSettings:
        return EpochSettings(stopping_strategy=self.stopping_strategy, max_repeats=self.max_repeats)

    def markdown(self) -> list[str]:
        """A table of the sources, in lines of Markdown."""
        lines = [
            "| source | read | train | held out | dropped | bad | tokens | part | in an epoch |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for source in self.sources:
            dropped = ", ".join(f"{n:,} {why}" for why, n in source.dropped.items())
            part = f"weight {source.weight:g}" if source.weight else "all rows"
            part = f"{source.share:,} rows" if source.share else part
            epoch = "packed" if source.epoch is None else f"{source.epoch:,} rows"
            cells = [
                f"{source.name}: {source.source}", f"{source.read:,}", f"{source.train:,}",
                f"{source.heldout:,}", dropped or "0", f"{sum(source.bad.values()):,}",
                f"{source.tokens:,}", part, epoch,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return [*lines, "", self._rule.describe()]


@dataclass
class DataCard:
    """Accounts for every row: read + cut = kept + dropped + bad (`check` asserts it).

    Attributes:
        settings: the settings that the data set was prepared with.
        format: of the rows, as set or as detected.
        read: number of rows in the source.
        cut: number of additional rows from splitting long documents (purpose pretrain), or
            conversations into a row for each reply.
        kept: number of rows in the data set, both splits together.
        dropped: reason -> number of rows that a setting left out.
        bad: reason -> number of rows that could not be used (only with on_bad_row: skip).
        bad_rows: {file, row, reason, message} of the first MAX_LISTED bad rows.
        notes: remark -> number of rows that it applies to.
        left_out: file beside the data that was not read -> why.
        splits: train and heldout.
        overlap: of the training rows with the held-out prompts; None: not measured.
        mixture: the sources of a mixture, and how its epochs are drawn; None: of other data sets.
        files: {name, rows, bytes, sha256} of each Arrow file.
        digest: sha256 over the Arrow files' names and contents.
    """

    purpose: str
    source: str = ""
    format: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    read: int = 0
    cut: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    splits: dict[str, SplitCard] = field(default_factory=dict)
    overlap: Overlap | None = None
    mixture: MixtureCard | None = None
    files: list[dict[str, Any]] = field(default_factory=list)
    digest: str = ""

    def check(self) -> None:
        """Assert that every row is accounted for; only a bug can break it."""
        rest = sum(self.dropped.values()) + sum(self.bad.values())
        assert self.read + self.cut == self.kept + rest, (
            f"{self.read} rows read, {self.cut} more by cutting, {self.kept} kept, dropped "
            f"{self.dropped}, bad {self.bad}"
        )

    def summary(self) -> str:
        """The row counts in one line."""
        parts = [f"{self.read:,} rows read"]
        parts += [f"{self.cut:,} more by splitting"] if self.cut else []
        parts.append(f"{self.kept:,} kept")
        parts += [f"{count:,} {reason}" for reason, count in {**self.dropped, **self.bad}.items()]
        sides = ", ".join(f"{name} {side.rows:,}" for name, side in self.splits.items())
        return f"{', '.join(parts)} ({sides})"

    def metadata(self) -> dict[str, Any]:
        """What the data set's artifact says of it."""
        return {
            "purpose": self.purpose,
            "source": self.source,
            "rows": {name: side.rows for name, side in self.splits.items()},
            "metrics": {"read": self.read, "kept": self.kept, **self.dropped, **self.bad},
        }

    def save(self, folder: Path) -> None:
        """Write card.json and card.md."""
        values = asdict(self)
        for later in ("cut", "left_out", "overlap", "mixture"):  # keeps the bytes of older cards
            if not values[later]:
                del values[later]
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / "card.json").write_text(text + "\n", encoding="utf-8")
        (folder / "card.md").write_text(self.markdown(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> DataCard:
        """Read card.json.

        Raises:
            DataError: the folder holds no data card.
        """
        path = Path(folder) / "card.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["splits"] = {name: SplitCard(**side) for name, side in data["splits"].items()}
            if data.get("overlap") is not None:
                data["overlap"] = Overlap(**data["overlap"])
            if data.get("mixture") is not None:
                sources = [SourceCard(**source) for source in data["mixture"].pop("sources")]
                data["mixture"] = MixtureCard(sources, **data["mixture"])
            return cls(**data)
        except FileNotFoundError:
            raise DataError(
                f"{folder} is not a data set of this project: it has no card.json; give the folder "
                "of an artifact of kind dataset."
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is not a data card ({error}); prepare the data again.") from (
                error
            )

    def markdown(self) -> str:
        """The card as Markdown."""
        lines = [
            f"# Data card: {self.source} for {self.purpose}",
            "",
            f"Format {self.format}; {self.read:,} rows read, {self.kept:,} kept. "
            f"Digest `{self.digest[:16]}`.",
            "",
            "| rows | count |",
            "| --- | ---: |",
            f"| read | {self.read:,} |",
            *([f"| more by splitting | {self.cut:,} |"] if self.cut else []),
            *(f"| kept, {name} | {side.rows:,} |" for name, side in self.splits.items()),
            *(f"| dropped: {reason} | {n:,} |" for reason, n in sorted(self.dropped.items())),
            *(f"| bad: {reason} | {n:,} |" for reason, n in sorted(self.bad.items())),
            *(f"| (note) {remark} | {n:,} |" for remark, n in sorted(self.notes.items())),
        ]
        if self.mixture is not None:
            lines += ["", "## Sources", "", *self.mixture.markdown()]
        for name, side in self.splits.items():
            lines += [
                "",
                f"## {name}",
                "",
                f"{side.rows:,} rows, {side.prompts:,} different prompts, {side.tokens:,} tokens, "
                f"{side.trainable_tokens:,} of them trained on.",
            ]
            if side.lengths:
                shown = ", ".join(f"{key} {value:g}" for key, value in side.lengths.items())
                lines += ["", f"Tokens per row: {shown}.", ""]
                lines += ["| tokens | rows |", "| ---: | ---: |"]
                lines += [f"| {b['from']} to {b['to']} | {b['rows']:,} |" for b in side.histogram]
        if self.left_out:
            lines += ["", "## Files that were not read", ""]
            lines += [f"- {name}: {why}" for name, why in sorted(self.left_out.items())]
        if self.overlap is not None:
            lines += ["", "## Held-out prompts in the training rows", "", *self.overlap.markdown()]
        if self.bad_rows:
            lines += ["", "## Bad rows", ""]
            lines += [f"- {r['file']}, row {r['row']}: {r['message']}" for r in self.bad_rows]
            if (more := sum(self.bad.values()) - len(self.bad_rows)) > 0:
                lines.append(f"- and {more:,} more")
        return "\n".join(lines) + "\n"


def describe_lengths(counts: Counter[int]) -> tuple[dict[str, float], list[dict[str, int]]]:
    """Mean and quantiles of lengths, and a histogram whose bins double in width.

    Args:
        counts: length in tokens -> number of rows.

    Returns:
        {"mean", "p50", "p90", "p99", "max"} and [{"from", "to", "rows"}], both ends included.
    """
    total = sum(counts.values())
    if not total:
        return {}, []
    ordered = sorted(counts.items())
    summary = {"mean": round(sum(size * n for size, n in ordered) / total, 1)}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        below = 0
        for size, n in ordered:
            below += n
            if below >= share * total:
                summary[name] = size
                break
    summary["max"] = ordered[-1][0]
    bins: Counter[int] = Counter()
    for size, n in ordered:
        bins[max(0, size - 1).bit_length()] += n
    histogram = [
        {"from": 2 ** (bin - 1) + 1 if bin else 0, "to": 2**bin, "rows": bins[bin]}
        for bin in range(min(bins), max(bins) + 1)
    ]
    return summary, histogram
