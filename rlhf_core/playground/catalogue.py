"""The runs and models that the page offers. The command fills it in, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.jobs.ensemble import CombineSettings

PUBLISHED = "champion: "
"""Prefix of the names of published models."""


@dataclass(frozen=True)
class Choice:
    """A model that can be selected.

    Attributes:
        name: shown to people; unique within a run.
        digest: of the artifact.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class RewardModels:
    """The reward models of a run, which score as one.

    Attributes:
        digests: of their artifacts.
        combine: how several scores become one.
    """

    digests: tuple[str, ...]
    combine: CombineSettings


@dataclass(frozen=True)
class RunChoices:
    """The models of a run, and the published ones.

    Attributes:
        id: of the run; empty: only published models.
        title: shown to people.
        reward_models: those that score the replies; None: no scores.
    """

    id: str
    title: str
    models: tuple[Choice, ...]
    reward_models: RewardModels | None = None

    def chosen(self, names: list[str]) -> list[Choice]:
        """The models with these names, in the order of the names."""
        known = {choice.name: choice for choice in self.models}
        return [known[name] for name in names if name in known]

    def suggested(self) -> list[str]:
        """Names of the initial selection: the newest model and the one before it."""
        names = [choice.name for choice in self.models]
        own = [name for name in names if not name.startswith(PUBLISHED)] or names
        return own[-2:]
