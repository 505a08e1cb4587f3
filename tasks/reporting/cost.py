"""What stages took: work, waiting, GPU-hours and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.events import seconds
from tasks.run import StageResult


@dataclass(frozen=True)
class Cost:
    """What a stage took, or several together.

    Attributes:
        work: seconds from the start of the ranks' job to its end.
        waited: seconds for a worker, a free device and the start of processes.
        gpu_hours: hours times GPUs; 0 on CPUs.
        price: of these hours; None without a price.
    """

    work: float
    waited: float
    gpu_hours: float
    price: float | None


def cost(results: Sequence[StageResult], gpu_hour_price: float | None) -> Cost:
    """The cost of stages that a run has made; reused ones cost it nothing."""
    made = [result for result in results if not result.reused]
    hours = sum(r.work["seconds"] * r.work["gpus"] for r in made if r.work.get("gpus")) / 3600
    return Cost(
        work=sum(r.worked for r in made),
        waited=sum(r.seconds - r.worked for r in made),
        gpu_hours=hours,
        price=None if gpu_hour_price is None else hours * gpu_hour_price,
    )


def reused(result: StageResult) -> str:
    """Of a reused stage: what making it took, where that is known."""
    made = result.work.get("seconds")
    return "reused" if made is None else f"reused ({seconds(made)})"


def cells(found: Cost) -> list[str]:
    """Work, waiting, GPU-hours and price as texts; empty where there is none."""
    return [
        seconds(found.work),
        seconds(found.waited) if found.waited >= 0.05 else "",
        f"{found.gpu_hours:.3g}" if found.gpu_hours else "",
        f"{found.price:.2f}" if found.price is not None else "",
    ]


HEADS = ("work", "waiting", "GPU-hours", "cost")
