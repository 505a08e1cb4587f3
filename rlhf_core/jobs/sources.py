"""Where data come from: one data set, or a mixture of several. The settings below `data`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.jobs.base import Format, Fraction, PositiveInt, Settings, Slug

StoppingStrategy = Literal["all_exhausted", "first_exhausted", "all_exhausted_without_replacement"]


class DataSettings(Settings):
    """A data set: where it is, how to read it, what to keep."""

    source: str = "builtin:chatterbot"
    """A path or s3:// URL (file, folder or pattern of .json, .jsonl, .csv, .parquet, .txt, .md;
    also packed, as .jsonl.gz), a Hugging Face dataset id, builtin:chatterbot, builtin:sums,
    reasoning-gym:TASK?size=500&seed=0, or feedback from `rlhf playground`: playground-votes (which
    reply people preferred) or playground-thumbs (whether a reply was good)."""
    format: Format = "auto"
    """Layout of the rows. auto: recognised by the columns of the first row."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names: the name that the format expects -> the name in the file. Name more columns
    here to keep them: answer (text or number) and extra (JSON) of prompts, for rewards; margin (a
    number) of preference pairs, for reward.margin_coef."""
    ignore_columns: tuple[str, ...] = ()
    """Columns, and keys inside messages, to leave unread although they may change what a row means
    (images, tools, weight, history ...). Without this setting such rows are refused. A name that no
    row has is an error."""
    subset: str | None = None
    """Configuration of a hub dataset, or language of the built-in set (english, chinese)."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    max_samples: PositiveInt | None = None
    """Maximum number of rows, after filtering and a seeded shuffle. Empty: all."""
    max_length: PositiveInt = 512
    """Longest sequence in tokens, prompt and reply together. Longer rows are dropped and counted;
    for pretraining they are cut into pieces."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt in tokens. Longer ones are dropped and counted. Empty: max_length."""
    heldout_fraction: Fraction = 0.1
    """Fraction of the prompts to hold out. A prompt is held out in all data sets or in none."""
    deduplicate: bool = True
    """Drop rows with the same text as an earlier row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used. skip: leave it out and count it in the data
    card."""
    system: str | None = None
    """System message for conversations that have none."""
    curriculum: str | None = None
    """Column of the file with a number by which each epoch is ordered, the smallest first, such as
    a difficulty. Rows without a number are refused. Empty: a new random order in each epoch."""

    @property
    def parts(self) -> tuple[DataSettings, ...]:
        """The data sets that are read: this one."""
        return (self,)

    @property
    def longest_prompt(self) -> int:
        """Longest prompt in tokens."""
        return self.max_prompt_length or self.max_length

    @property
    def renames(self) -> dict[str, str]:
        """`columns`, and the column `curriculum`: name that is read -> name in the file."""
        return self.columns | ({"curriculum": self.curriculum} if self.curriculum else {})


class Share(Settings):
    """A source's part of an epoch."""

    weight: Annotated[float, Field(gt=0.0)] | None = None
    """Part of an epoch's rows, relative to the weights of the other sources. For the stage
    pretrain it counts packed sequences, so tokens."""
    rows: PositiveInt | None = None
    """Rows in an epoch (packed sequences for pretrain), in place of a weight. Empty, without
    weight: all rows."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.weight is not None and self.rows is not None:
            raise ValueError(
                f"weight is {self.weight:g} and rows is {self.rows}; they exclude each other: "
                "clear one"
            )
        return self


class MixSource(Share, DataSettings):
    """A source of a mixture: a data set, and its part in an epoch."""

    source: str
    """Where the rows are, as for a single data set. Each source of a mixture names its own."""
    name: Slug | None = None
    """Name in metrics and data cards. Empty: the last part of the source, and the subset."""

    @model_validator(mode="before")
    @classmethod
    def _is_one_data_set(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if "mix" in data:
                raise ValueError("a mixture stands inside a mixture; list its sources in the outer")
            if data.get("source") == "sampled":
                raise ValueError(
                    "sampled preferences cannot be mixed: they are made while the run goes on; "
                    "mix files or data sets of the hub, or set {source: sampled} alone"
                )
        return data

    @property
    def label(self) -> str:
        """The name, or one made of source and subset."""
        if self.name:
            return self.name
        path = self.source.partition("?")[0].rstrip("/")
        parts = [part for part in re.split(r"[/:]", path) if not set(part) & set("*[")] or [path]
        stem = parts[-1].partition(".")[0] or parts[-1]
        found = stem if self.subset is None else f"{stem}-{self.subset}"
        return re.sub(r"[^A-Za-z0-9._-]+", "-", found).strip("-._")[:100] or "source"


class EpochSettings(Settings):
    """How an epoch is drawn from the sources of a mixture."""

    stopping_strategy: StoppingStrategy = "all_exhausted"
    """When an epoch ends, as in datasets.interleave_datasets. all_exhausted: when every row was
    used; smaller sources are repeated, up to max_repeats. first_exhausted: when the first source is
    used up. all_exhausted_without_replacement: every row is used once; weights hold until the first
    source is used up."""
    max_repeats: PositiveInt = 4
    """How often an epoch may use a row (all_exhausted). Up to 4 epochs of the same data are nearly
    as good as new data (arXiv 2305.16264)."""

    def describe(self) -> str:
        """The rule in a sentence, for cards and reports."""
        repeats = f", max_repeats {self.max_repeats}"
        counts = self.stopping_strategy == "all_exhausted"
        return f"Stopping strategy: {self.stopping_strategy}{repeats if counts else ''}."


class Mixture(EpochSettings):
    """Several data sets in one. Settings of a data set beside `mix`, such as max_length, hold for
    each source that does not set them itself."""

    mix: tuple[MixSource, ...]
    """The sources. All have a weight, or none has."""

    @model_validator(mode="before")
    @classmethod
    def _common_settings(cls, data: Any) -> Any:
        """Settings beside `mix` that each source gets."""
        if not isinstance(data, dict) or not isinstance(data.get("mix"), list | tuple):
            return data
        if "source" in data:
            raise ValueError("source stands beside mix; put it into the list, or leave it out")
        common = {k: v for k, v in data.items() if k in DataSettings.model_fields}
        own = {k: v for k, v in data.items() if k not in common}
        return own | {
            "mix": [common | part if isinstance(part, dict) else part for part in data["mix"]]
        }

    @field_validator("mix")
    @classmethod
    def _sources_agree(cls, mix: tuple[MixSource, ...]) -> tuple[MixSource, ...]:
        if not mix:
            raise ValueError(
                "the list is empty; name at least one source, such as {source: a.json}"
            )
        name, count = Counter(part.label for part in mix).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"{count} sources have the name {name}; give each a name of its own, such as "
                f"name: {name}-2"
            )
        weighted = [part.label for part in mix if part.weight is not None]
        others = [part.label for part in mix if part.weight is None]
        if weighted and others:
            raise ValueError(
                f"{weighted[0]} has a weight and {others[0]} has none; give each source a weight, "
                "or none"
            )
        fractions = {part.heldout_fraction: part.label for part in reversed(mix)}
        if len(fractions) > 1:
            found = ", ".join(f"{share:g} for {label}" for share, label in fractions.items())
            raise ValueError(
                f"heldout_fraction is {found}; a prompt is held out in all sources or in none: set "
                "it once, beside mix"
            )
        for column in ("curriculum", "margin"):  # numbers, which no value stands for
            named = [column in part.renames for part in mix]
            if len(set(named)) > 1:
                one, other = (mix[named.index(has)].label for has in (True, False))
                raise ValueError(
                    f"{one} has a {column} and {other} has none; name the column of each source, "
                    "or of none"
                )
        return mix

    @property
    def parts(self) -> tuple[MixSource, ...]:
        """The data sets that are read."""
        return self.mix

    @property
    def max_length(self) -> int:
        """Longest sequence of any source, in tokens."""
        return max(part.max_length for part in self.mix)

    @property
    def longest_prompt(self) -> int:
        """Longest prompt of any source, in tokens."""
        return max(part.longest_prompt for part in self.mix)


Source = DataSettings | Mixture
"""What a data set is made of."""
