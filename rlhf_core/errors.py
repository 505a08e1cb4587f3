"""Exceptions with a message for the user.

    RLHFError                   category, exit code; str() is the whole message for the user
    ├── ConfigError             "config"     a setting is unknown, contradictory or out of range
    │   └── PreflightError      "config"     several problems, reported in one list
    ├── DataError               "data"       a file, row or column is not what its format needs
    ├── ModelError              "model"      weights, tokenizer or chat template cannot be used
    ├── StoreError              "store"
    │   ├── ArtifactNotFound    "not_found"
    │   ├── ArtifactCorrupt     "store"
    │   └── StoreUnavailable    "store"      unreachable, refused, full: worth a retry
    │       └── ObjectUnreadable  "store"    the server has an entry for it, but cannot read it
    ├── OutOfMemory             "oom"        retried with half the micro-batch
    ├── Preempted               "preempted"  got a signal; a retry resumes from its checkpoint
    ├── TrainingFailure         "training"
    │   ├── NonFinite           "nonfinite"  a loss or gradient is NaN or infinite
    │   │   └── RateLowered     "rate_lowered"  the same; retried with a lower learning rate
    │   └── PolicyCollapse      "collapse"   KL, repetition or the like left its bound
    ├── GateFailed              "gate"       a result violates a bound of the settings
    │   └── RewardHacked        "reward_hacked"  the same, and the verdict is "reward hacked"
    ├── JudgeError              "judge"      a judge's endpoint fails or gives unreadable answers
    └── JobFailed               "job"        a launched process died; category is the process's own

A rank writes the category to its error file. The orchestrator decides from it whether to retry:
`RETRYABLE` lists the categories for which a retry can help. "hang", a rank that waited too long for
another one, has no class: the category comes from a library's error.
"""

from __future__ import annotations

from collections.abc import Sequence

RETRYABLE = frozenset({"store", "oom", "lost", "preempted", "hang", "rate_lowered"})


class RLHFError(Exception):
    """Base of all errors with a message meant for the user."""

    category: str = "internal"


class ConfigError(RLHFError, ValueError):
    """A setting is unknown, contradictory or out of range."""

    category = "config"


class PreflightError(ConfigError):
    """All problems that were found before anything was started.

    Args:
        problems: one text each, saying what was found, what is needed and what to do.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
        super().__init__(f"{len(self.problems)} {noun} found before starting:\n{lines}")


class DataError(RLHFError, ValueError):
    """A file, row or column is not what its format needs."""

    category = "data"


class ModelError(RLHFError, ValueError):
    """Weights, tokenizer or chat template cannot be used."""

    category = "model"


class StoreError(RLHFError):
    """The artifact store cannot do what was asked."""

    category = "store"


class ArtifactNotFound(StoreError):
    """No artifact answers to the given reference."""

    category = "not_found"


class ArtifactCorrupt(StoreError):
    """Stored bytes do not have the sha256 that their manifest names."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, refuses the credentials, or is full."""


class ObjectUnreadable(StoreUnavailable):
    """The server has an entry for an object and cannot read it: a part of the server is down, or
    the object is lost."""


class OutOfMemory(RLHFError):
    """The device or the host ran out of memory."""

    category = "oom"


class Preempted(RLHFError):
    """The job got a signal to stop and wrote a checkpoint, from which another attempt resumes."""

    category = "preempted"


class TrainingFailure(RLHFError):
    """Training cannot continue; the last good checkpoint is kept."""

    category = "training"


class NonFinite(TrainingFailure):
    """A loss or a gradient norm is NaN or infinite.

    Attributes:
        micro_batch: index of the rank's micro-batch whose loss it was; None for a norm.
    """

    category = "nonfinite"

    def __init__(self, text: str, micro_batch: int | None = None) -> None:
        super().__init__(text)
        self.micro_batch = micro_batch


class RateLowered(NonFinite):
    """A loss or a gradient norm is NaN or infinite, and another attempt resumes from the last
    checkpoint with the lower learning rate that `on_nonfinite` sets."""

    category = "rate_lowered"


class PolicyCollapse(TrainingFailure):
    """KL, repetition, entropy or unfinished replies left the bounds that the job sets."""

    category = "collapse"


class GateFailed(RLHFError):
    """A stage's result violates a bound of the settings. The result is kept in the store; another
    attempt would give the same."""

    category = "gate"


class RewardHacked(GateFailed):
    """A gate failed, and the evaluation's verdict is "reward hacked"."""

    category = "reward_hacked"


class JudgeError(RLHFError):
    """The endpoint of a judge refused, failed after all retries, or gave answers that cannot be
    read."""

    category = "judge"


class JobFailed(RLHFError):
    """A launched job ended without its artifact.

    Args:
        message: what to show the user.
        category: the category that the failed process reported; "lost" if it reported none.
        candidate: digest of the last good model, or "" (see rlhf_core.runtime.candidates).
    """

    def __init__(self, message: str, category: str = "lost", candidate: str = "") -> None:
        super().__init__(message)
        self.category = category
        self.candidate = candidate
