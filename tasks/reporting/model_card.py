"""The model card (README.md) of a published model: evaluation, lineage, data, settings.

The same inputs give the same bytes, so that publishing twice gives one artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from rlhf_core.errors import StoreError
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import reply_length
from rlhf_core.store import Artifact, Store
from tasks.reporting import origins
from tasks.reporting.benchmarks import benchmarks_of
from tasks.reporting.evaluation import evaluation_of
from tasks.run import Run

FOLDER = "path/to/this/folder"
USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
messages = [{{"role": "user", "content": "How are you?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**inputs, max_new_tokens={tokens}, do_sample=True)
print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""

ADAPTER = """\
The folder `adapter` has the last stage's changes as a LoRA adapter (peft), for servers that load
one base model and many adapters; its `adapter_config.json` names the base model."""


def model_card(run: Run, name: str, policy: str, evaluation: str | None) -> str:
    """Markdown with a Hugging Face header.

    Args:
        evaluation: None: the policy is the last good one of a failed stage, without an evaluation.
    """
    store = run.store
    model = store.get(policy)
    stages = {name: store.get(result.digest) for name, result in run.stages.items()}
    stages.pop("compare", None)  # whether it exists depends on earlier publications
    if evaluation is None:
        stages |= {str(model.metadata.get("algorithm")): model}
        judged = f"Not evaluated: {model.metadata.get('reason')}."
    else:
        judged = evaluation_of(run, evaluation).markdown()
    base = stages.get("model")
    source = run.config.model.source
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", *recipe.model_stages(run.config), "conversational"],
    }
    if base and base.metadata.get("license"):
        front["license"] = str(base.metadata["license"]).lower()
    if "/" in source and ":" not in source and not source.startswith((".", "/", "~")):
        front["base_model"] = source
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False).strip() + "\n---",
        f"# {name}",
        f"`{source}`, trained in these steps: {_steps(run)}.",
        USE.format(tokens=reply_length(run.config)),
        *([ADAPTER] if any(f.path.startswith("adapter/") for f in model.files) else []),
        "## Evaluation",
        judged,
        *(["## Benchmarks", text] if (text := benchmarks_of(run)) else []),
        "## Lineage",
        lineage_table(stages),
        "## Data",
        *(_data(store, s, a) for s, a in stages.items() if a.kind == "dataset"),
        "## Settings",
        *(_settings(s, a) for s, a in stages.items() if "job" in a.metadata),
    ]
    return "\n\n".join(parts) + "\n"


def _steps(run: Run) -> str:
    labels = [recipe.display_name(stage) for stage in run.config.stages]
    again = f" (in {run.config.rounds} rounds)" if run.config.rounds > 1 else ""
    return ", ".join(labels) + again


def lineage_table(stages: Mapping[str, Artifact]) -> str:
    """Stages with their artifacts, and the stages that these were made from."""
    names = {artifact.digest: stage for stage, artifact in stages.items()}
    rows = ["| stage | artifact | made from |", "| --- | --- | --- |"]
    for stage, artifact in stages.items():
        parents = ", ".join(names.get(p, p[:12]) for p in dict.fromkeys(artifact.parents))
        rows.append(f"| {stage} | `{artifact.kind}/{artifact.digest}` | {parents} |")
    return "\n".join(rows)


def _data(store: Store, stage: str, artifact: Artifact) -> str:
    card = data_card(store, artifact)
    lines = [f"**{stage}**: {origins.source(artifact)}, digest `{artifact.digest[:12]}`"]
    if card:
        text = json.dumps(card, indent=1, ensure_ascii=False, sort_keys=True)
        lines.append(f"<details><summary>data card</summary>\n\n```json\n{text}\n```\n</details>")
    return "\n\n".join(lines)


def data_card(store: Store, artifact: Artifact) -> dict[str, Any]:
    """The data card of a data set, or {}."""
    for path in ("card.json", "data_card.json"):
        if any(entry.path == path for entry in artifact.files):
            try:
                value = json.loads(store.read_bytes(artifact.digest, path))
            except (StoreError, ValueError):
                return {}
            return value if isinstance(value, dict) else {}
    card = artifact.metadata.get("card", {})
    return card if isinstance(card, dict) else {}


def _settings(stage: str, artifact: Artifact) -> str:
    job = dict(artifact.metadata["job"])
    metrics = artifact.metadata.get("metrics")
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=True).strip()
    if metrics:
        text += "\n\n# metrics\n" + yaml.safe_dump(metrics, sort_keys=False).strip()
    return f"<details><summary>{stage}</summary>\n\n```yaml\n{text}\n```\n</details>"
