"""How a launch ended, by the store: results and reports of its nodes, whoever died."""

from __future__ import annotations

from rlhf_core.errors import JobFailed
from rlhf_core.runtime.launches import REASON, NodeReport, read_reports
from rlhf_core.store import Store, open_store
from tasks.launchers.base import Launch, Outcome


def results(launch: Launch) -> list[Outcome] | None:
    """The jobs' results in the store, whoever made them; None if one is missing."""
    store = open_store(launch.store)
    found = [(job, store.stage_result(job.key())) for job in launch.jobs.values()]
    if any(artifact is None for _, artifact in found):
        return None
    return [Outcome(a.digest, a.kind, job.key()) for job, a in found if a is not None]


def failure(
    store: Store,
    name: str,
    launch: str,
    attempt: str,
    nodes: int,
    *,
    where: str = "",
    scheduler: tuple[str, str] | None = None,
) -> JobFailed:
    """Why an attempt has no result: category and text of what failed first, on whichever node.

    Args:
        name: of the stage.
        launch: its id.
        nodes: that the attempt had.
        where: last line of the message, such as the job and the log's path.
        scheduler: category and text of what the scheduler says. It is told where no node gives a
            reason of its own.
    """
    reports = read_reports(store, launch, attempt, nodes)
    failed = sorted((r for r in reports.values() if r.state == "failed"), key=_order)
    silent = [n for n in range(nodes) if n not in reports or reports[n].state == "running"]
    if failed and failed[0].weight == REASON:
        category, text = failed[0].category, _told(failed[0], nodes)
    elif scheduler is not None:
        category, text = scheduler
    elif silent and len(silent) < nodes:
        names = " and ".join(_name(n, reports) for n in silent)
        category, text = "lost", f"{names} vanished: its agent ended without a word"
    elif failed:
        category, text = failed[0].category, _told(failed[0], nodes)
    else:
        category, text = "lost", "none of its nodes left a word in the store"
    return JobFailed("\n".join(filter(None, (f"{name} failed: {text}", where))), category)


def _order(report: NodeReport) -> tuple[int, float]:
    return report.weight, report.time


def _told(report: NodeReport, nodes: int) -> str:
    return report.text if nodes == 1 else f"node {report.node} ({report.host}): {report.text}"


def _name(node: int, reports: dict[int, NodeReport]) -> str:
    return f"node {node} ({reports[node].host})" if node in reports else f"node {node}"
