"""What the page offers: runs, and the models of each. Filled in by the command, without torch."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED = "champion: "
"""Before the names of published models."""


@dataclass(frozen=True)
class Choice:
    """A model that can be asked.

    Attributes:
        name: for people; one of its kind within a run.
        digest: of its artifact.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class RunChoices:
    """The models of a run, and those that are published.

    Attributes:
        id: of the run; empty: only published models.
        title: for people.
        reward_model: digest of the artifact that scores replies; None: there is none.
    """

    id: str
    title: str
    models: tuple[Choice, ...]
    reward_model: str | None = None

    def chosen(self, names: list[str]) -> list[Choice]:
        """The models with these names, in the order of the names."""
        known = {choice.name: choice for choice in self.models}
        return [known[name] for name in names if name in known]

    def suggested(self) -> list[str]:
        """Two to begin with: the newest one, and the one that it was aligned from."""
        names = [choice.name for choice in self.models]
        own = [name for name in names if not name.startswith(PUBLISHED)] or names
        return own[-2:]
