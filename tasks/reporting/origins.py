"""What a run's model was made from: data sets and models, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.store import Artifact
from tasks.events import headline, table_cell
from tasks.reporting.lineage import Node
from tasks.run import Run


def source(artifact: Artifact) -> str:
    """Where an artifact comes from, if from outside: files, a hub, a labeller; "" otherwise."""
    job: Mapping[str, Any] = artifact.metadata.get("job") or {}
    if "labeller" in job:
        judge = job.get("judge")
        return f"sampled, compared by {judge['model'] if judge else job['labeller']}"
    found = str(artifact.metadata.get("source") or job.get("source") or "")
    return f"a mixture of {found}" if "mix" in job else found


def known(run: Run) -> dict[str, Artifact | None]:
    """The run's artifacts and all their ancestors, by digest; None for one that is gone.

    Of a comparison with the champion only itself: how that model was made is its own run's.
    """
    found: dict[str, Artifact | None] = {}
    for name, result in reversed(run.stages.items()):  # the last ones have the most ancestors
        if name == "compare":
            found[result.digest] = run.store.get(result.digest)
        elif result.digest not in found:
            found |= run.store.lineage(result.digest)
    return found


def nodes(run: Run, found: Mapping[str, Artifact | None]) -> dict[str, Node]:
    """The boxes of the drawing, by digest; the run's own stages have their names."""
    names = {result.digest: name for name, result in run.stages.items()}
    boxes = {}
    for digest, artifact in found.items():
        if artifact is None:
            boxes[digest] = Node("not in the store", digest[:12])
            continue
        title = (
            names.get(digest) or f"{artifact.metadata.get('algorithm') or artifact.kind}, earlier"
        )
        boxes[digest] = Node(title, artifact.ref, artifact.parents, source(artifact))
    return boxes


def made_from(run: Run, found: Mapping[str, Artifact | None]) -> str:
    """A table of the data and models from outside that the run's model was made from."""
    model = run.artifacts_by_role.get("model")
    todo, used = [model] if model else [], dict[str, Artifact]()
    while todo:
        digest = todo.pop()
        artifact = found.get(digest)
        if artifact is not None and digest not in used:
            used[digest] = artifact
            todo += artifact.parents
    names = {result.digest: name for name, result in run.stages.items()}
    rows = [["made from", "source", "contents", "artifact"], ["---"] * 4]
    for digest, artifact in sorted(used.items(), key=lambda item: item[1].created):
        if origin := source(artifact):
            title = names.get(digest) or str(artifact.metadata.get("algorithm") or artifact.kind)
            contents = headline(artifact.metadata.get("metrics") or {})
            rows.append([title, table_cell(origin), contents, f"`{artifact.ref}`"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""
