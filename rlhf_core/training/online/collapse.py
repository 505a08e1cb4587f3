"""Stops a policy that has collapsed, and publishes the last good one as a candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_core.errors import PolicyCollapse, StoreError
from rlhf_core.jobs import OnlineJob
from rlhf_core.runtime import candidates
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import UPLOAD_SECONDS

ALIKE = 0.5  # share of replies with one opening from which on there is a warning

Save = Callable[[dict[str, Tensor], Path], None]


@dataclass(frozen=True)
class Bound:
    """A metric that is watched, and the `highest` or lowest mean of it that is allowed."""

    setting: str
    metric: str  # in the result of `summarise`, or made of it by `watched`
    what: str
    highest: bool
    means: str
    helps: str

    @property
    def side(self) -> str:
        """The side of the bound on which a policy has collapsed."""
        return "above" if self.highest else "below"


BOUNDS = (
    Bound(
        "max_kl", "kl", "KL to the SFT model (nats a reply)", True,
        "the policy has left the region where its rewards can judge",
        "Raise {0}.kl_coef (twofold at a time) or lower {0}.learning_rate",
    ),
    Bound(
        "max_repetition", "repetition", "share of repeated 4-grams in a reply", True,
        "replies repeat themselves, which the rewards do not penalise",
        "Add a repetition rule to {0}.rewards, raise {0}.kl_coef or lower {0}.learning_rate",
    ),
    Bound(
        "min_length", "length", "length of the replies (tokens)", False,
        "replies have become empty, or nearly",
        "Raise {0}.kl_coef, lower {0}.learning_rate or add a length rule to {0}.rewards",
    ),
    Bound(
        "max_length", "length", "length of the replies (tokens)", True,
        "replies grow, the most common way to exploit a reward model",
        "Add a length rule to {0}.rewards, raise {0}.kl_coef or {0}.missing_eos_penalty",
    ),
    Bound(
        "min_entropy", "entropy", "entropy (nats a token)", False,
        "the replies to a prompt are all alike, so there is nothing left to compare",
        "Raise {0}.kl_coef, lower {0}.learning_rate or take fewer {0}.steps",
    ),
    Bound(
        "max_unfinished", "unfinished", "share of replies without an end of turn", True,
        "replies no longer end",
        "Raise {0}.missing_eos_penalty or {0}.max_new_tokens, or add a length rule to {0}.rewards",
    ),
    Bound(
        "max_opening", "top_opening", "share of replies with the most common opening", True,
        "replies to different prompts begin alike, as they do when the rewards favour a phrase",
        "Raise {0}.kl_coef, lower {0}.learning_rate, or set {0}.kl_target",
    ),
    Bound(
        "min_distinct", "distinct_2_left", "share of the first rollouts' distinct-2", False,
        "replies to different prompts use the same words",
        "Raise {0}.kl_coef, lower {0}.learning_rate, or set {0}.kl_target",
    ),
)  # fmt: skip


def find_collapse(job: OnlineJob, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first bound that the last rollouts exceed, on average.

    Args:
        lines: metrics of the rollouts so far, oldest first, with "step" from 1.

    Returns:
        setting, metric, value, bound, step and window (rollouts); None when no bound is exceeded,
        or there are fewer rollouts than the window has.
    """
    window = min(job.collapse_window, job.steps)
    means = watched(lines, window)
    for bound in BOUNDS:
        limit, value = getattr(job, bound.setting), means.get(bound.metric)
        if limit is None or value is None:
            continue
        if value > limit if bound.highest else value < limit:
            return {
                "setting": bound.setting, "metric": bound.metric, "value": value, "bound": limit,
                "step": int(lines[-1]["step"]), "window": window,
            }  # fmt: skip
    return None


def watched(lines: Sequence[dict[str, Any]], window: int) -> dict[str, float]:
    """Means of the metrics over the last rollouts; nothing if there are fewer than the window has.
    To them belong unfinished (1 - finished) and distinct_2_left (distinct_2 over its mean in the
    first rollouts)."""
    rollouts = [line for line in lines if "finished" in line]  # without the evaluation of step 0
    if len(rollouts) < window:
        return {}
    means = _means(rollouts[-window:])
    means["unfinished"] = 1.0 - means["finished"]
    first = _means(rollouts[:window]).get("distinct_2")
    if first and "distinct_2" in means:
        means["distinct_2_left"] = means["distinct_2"] / first
    return means


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = set.intersection(*(set(line) for line in lines))
    return {name: sum(line[name] for line in lines) / len(lines) for name in names}


def warn_of_openings(
    job: OnlineJob, lines: Sequence[dict[str, Any]], log: Callable[[str], None]
) -> None:
    """Say it once when the replies begin to open alike.

    Args:
        lines: metrics of the rollouts so far, that of the last step included.
    """
    window = min(job.collapse_window, job.steps)
    before, now = (opens_alike(part, window) for part in (lines[:-1], lines))
    if now and not before:
        share = watched(lines, window)["top_opening"]
        log(
            f"WARNING: {share:.0%} of the replies of the last {window} rollouts begin with the "
            "same three tokens, twice as many as at first: the policy may be exploiting its "
            f"rewards. Look at the samples; raise {job.algorithm}.kl_coef, or set "
            f"{job.algorithm}.max_opening to stop there"
        )


def opens_alike(lines: Sequence[dict[str, Any]], window: int) -> bool:
    """Whether half of the last replies have one opening, and not half as many had in the first
    rollouts: replies of a fixed form have one from the beginning."""
    first = watched([line for line in lines if "finished" in line][:window], window)
    now = watched(lines, window)
    share = now.get("top_opening", 0.0)
    return share >= ALIKE and share >= 2 * first.get("top_opening", 1.0)


def stop_if_collapsed(
    job: OnlineJob,
    checkpointer: Checkpointer,
    whole_policy: Callable[[], Save],
    lines: Sequence[dict[str, Any]],
) -> None:
    """Every rank calls, after the step's metrics are logged.

    Args:
        lines: metrics of the rollouts so far, on rank 0.
        whole_policy: called by every rank when the policy has collapsed; gives what writes it with
            some checkpoint's weights into a folder.

    Raises:
        PolicyCollapse: the last rollouts exceed a bound. The newest checkpoint from before them is
            published as a candidate, not as the stage's result (see `candidates`).
    """
    group = checkpointer.strategy.group
    found = group.broadcast(find_collapse(job, lines) if checkpointer.context.main else None)
    if found is None:
        return
    save = whole_policy()
    # The other ranks wait here: one that left early would end this one.
    candidate = group.broadcast(publish_candidate(job, checkpointer, found, save))
    bound = next(b for b in BOUNDS if b.setting == found["setting"])
    raise PolicyCollapse(
        f"{job.algorithm} step {found['step']}: the {bound.what} is {found['value']:.4g}, mean of "
        f"the last {found['window']} rollouts, {bound.side} {job.algorithm}.{bound.setting} "
        f"{found['bound']:g}: {bound.means}. {bound.helps.format(job.algorithm)}, and run again: "
        f"the stage then starts from the beginning, those before it are reused. {candidate}"
    )


def publish_candidate(
    job: OnlineJob, checkpointer: Checkpointer, found: dict[str, Any], save: Save
) -> str:
    """Publish the last good policy (rank 0). Returns a sentence for the error message."""
    context = checkpointer.context
    if not context.main:
        return ""
    bound = next(b for b in BOUNDS if b.setting == found["setting"])
    # The bound was exceeded by the rollouts of steps (before, step]; of these, this policy sampled
    # only the first.
    before = found["step"] - found["window"]
    try:
        checkpointer.settle(min(UPLOAD_SECONDS, job.resources.collective_timeout / 2))
        good = checkpointer.weights_before(before)
        if good is None:
            candidates.write(context.store, context.key, None)
            return (
                f"No checkpoint from before these rollouts (step {max(before, 0)} or earlier) is "
                f"kept; {job.algorithm}.resources.checkpoint_every is "
                f"{job.resources.checkpoint_every}, keep_checkpoints "
                f"{job.resources.keep_checkpoints}."
            )
        step, weights = good
        artifact = candidates.read(context.store, context.key)
        if artifact is None or artifact.metadata["metrics"]["steps"] != step:
            folder = context.scratch("candidate")
            save(weights, folder)
            reason = (
                f"collapsed at step {found['step']}: {found['metric']} {found['value']:.4g} "
                f"{bound.side} {bound.setting} {found['bound']:g}; weights of step {step}"
            )
            metadata = {
                "candidate": True, "reason": reason, "collapsed": found, "metrics": {"steps": step}
            }  # fmt: skip
            artifact = context.publish(job, folder, metadata, bind=False)
            candidates.write(context.store, context.key, artifact)
    except StoreError as error:  # must not hide why the stage failed
        return f"The last good policy could not be published: {error}"
    return (
        f"The policy after step {step}, the newest checkpoint from before these rollouts, is in "
        f"the store as {artifact.ref}."
    )
