"""The model card of a release: what a stranger needs to know about the model, and nothing private.

The evaluation is that of the published model's own card. Data sets are described by source and
counts, never by their rows; of local paths only the last part is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

import yaml

from rlhf_core.errors import ArtifactCorrupt
from rlhf_core.pipeline import recipe
from rlhf_core.store import Artifact, Store, registry
from tasks.events import headline, table_cell
from tasks.release.origin import hub_data, trained_from
from tasks.reporting import origins
from tasks.reporting.model_card import FOLDER, USE, lineage_table

REPLY = 256  # tokens, in the example
GOOD = ("better", "better at a price")  # verdicts that need no warning
TRAINING = ("model", "reward_model", "dataset")  # kinds; an evaluation's settings name servers
_LOCAL_PATH = re.compile(r"(?<![\w:/.<])~?(?:/[\w.@%+~-]+)+/([\w.@%+~-]+)")


def release_card(
    store: Store,
    artifact: Artifact,
    models: Sequence[Artifact],
    base: str | None,
    adapter: bool = False,
    repository: str | None = None,
) -> str:
    """Markdown with a Hugging Face header.

    Args:
        models: the artifact, the model that it was trained from, and so on.
        base: hub id of the base model, if there is one.
        repository: hub id of the release itself, for the example; None: it is a folder.
    """
    known = store.lineage(artifact.digest)
    made = {d: a for d, a in known.items() if a is not None and a.kind != "published"}
    order = TopologicalSorter({d: a.parents for d, a in made.items()}).static_order()
    named = _named([made[d] for d in order if d in made])
    data = {name: a for name, a in named.items() if a.kind == "dataset"}
    name = str(artifact.metadata.get("name") or models[0].metadata.get("algorithm") or "model")
    steps = [
        str(m.metadata["job"]["algorithm"]) for m in reversed(models[:-1]) if "job" in m.metadata
    ]
    front = _front(models, data, base, adapter, steps)
    trained = ", ".join(recipe.display_name(step) for step in steps) or "none"
    start = origins.source(models[-1]) or models[-1].ref
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False).strip() + "\n---",
        f"# {name}",
        *_warnings(store, artifact, models),
        f"Base model: `{start}`. Trained in these steps: {trained}.",
        _example(adapter, repository),
        _evaluation(store, artifact),
        "## Lineage",
        lineage_table(named),
        *(["## Data", _data_table(data)] if data else []),
        "## Settings",
        *(_settings(s, a) for s, a in named.items() if "job" in a.metadata and a.kind in TRAINING),
    ]
    return without_local_paths("\n\n".join(filter(None, parts)) + "\n")


def _example(adapter: bool, repository: str | None) -> str:
    text = USE.format(tokens=REPLY)
    if adapter:  # peft fetches the base model too
        text = text.replace("AutoModelForCausalLM", "AutoPeftModelForCausalLM").replace(
            "from transformers import AutoPeftModelForCausalLM, AutoTokenizer",
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
        )
    return text.replace(FOLDER, repository) if repository else text


def _front(
    models: Sequence[Artifact],
    data: Mapping[str, Artifact],
    base: str | None,
    adapter: bool,
    steps: Sequence[str],
) -> dict[str, Any]:
    """The header. The licence is the one that the base model came with; none is made up."""
    licenses = [str(m.metadata["license"]).lower() for m in models if m.metadata.get("license")]
    sets = {found for a in data.values() if (found := hub_data(a))}
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", *dict.fromkeys(steps), "conversational"],
        **({"license": licenses[0]} if licenses else {}),
        **({"base_model": base} if base else {}),
        **({"base_model_relation": "adapter" if adapter else "finetune"} if base else {}),
        **({"datasets": sorted(sets)} if sets else {}),
    }


def _warnings(store: Store, artifact: Artifact, models: Sequence[Artifact]) -> list[str]:
    """What speaks against the model, as quoted paragraphs."""
    found = []
    if artifact.kind != "published":
        stage = artifact.metadata.get("algorithm") or "import"
        found.append(
            f"**Not evaluated.** This is the result of the stage {stage}, which no gate judged."
        )
    for name in registry.model_names(store):
        try:
            model = registry.read_model(store, name)
        except ArtifactCorrupt:  # of another model
            continue
        if version := model.version(artifact.digest):
            changes = [t for t in model.history if t.digest == artifact.digest]
            reasons = [t.reason for t in changes if t.action == "candidate" and t.reason]
            found += [f"**Not promoted by its run.** {table_cell(reason)}" for reason in reasons]
            run = store.read_record(f"runs/{version.run}.json") or {} if version.run else {}
            if (verdict := run.get("verdict")) and verdict not in GOOD:
                found.append(f"**Verdict of its evaluation: {verdict}.** See below.")
    if trained_from(models[-1]):
        found.append("**Its base model is not on record**: earlier artifacts were deleted.")
    return [f"> {text}" for text in dict.fromkeys(found)]


def _evaluation(store: Store, artifact: Artifact) -> str:
    """Evaluation and benchmarks, as the published model's card has them."""
    if artifact.kind != "published":
        return ""
    card = store.read_bytes(artifact.digest, "README.md").decode(errors="replace")
    found = re.search(r"^## Evaluation$.*?(?=^## Lineage$)", card, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def _named(artifacts: Sequence[Artifact]) -> dict[str, Artifact]:
    """Artifacts by the name of their stage; a repeated one has a number."""
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        stage = str(artifact.metadata.get("algorithm") or artifact.kind)
        if stage in ("data", "mix"):
            stage = f"data-{artifact.metadata.get('purpose', 'set')}"
        number = 1
        while (name := stage if number == 1 else f"{stage} {number}") in found:
            number += 1
        found[name] = artifact
    return found


def _data_table(data: Mapping[str, Artifact]) -> str:
    rows = ["| data set | source | rows | digest |", "| --- | --- | --- | --- |"]
    for name, artifact in data.items():
        counts = headline(artifact.metadata.get("metrics") or {})
        source = table_cell(origins.source(artifact))
        rows.append(f"| {name} | {source} | {counts} | `{artifact.digest[:12]}` |")
    return "\n".join(rows)


def _settings(stage: str, artifact: Artifact) -> str:
    text = yaml.safe_dump(dict(artifact.metadata["job"]), sort_keys=False, allow_unicode=True)
    return f"<details><summary>{stage}</summary>\n\n```yaml\n{text.strip()}\n```\n</details>"


def without_local_paths(text: str) -> str:
    """The text with the last part of each absolute path only: folders name people and projects."""
    return _LOCAL_PATH.sub(r"…/\1", text)
