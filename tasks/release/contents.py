"""What is released of a model's artifact: the files that other programs read, and a model card.

    merged     config.json, *.safetensors, tokenizer, chat template, generation config, README.md
    adapter    adapter_config.json, adapter_model.safetensors, tokenizer, chat template, README.md

A release is an artifact too, whose files are those of the model by content: nothing is copied in
the store, the files are verified when they are fetched, and it stays on record what was released.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ModelError
from rlhf_core.store import Artifact, FileEntry, Store
from tasks.release.card import release_card
from tasks.release.origin import base_model, hub_model, model_lineage

Layout = Literal["merged", "adapter"]

ADAPTER = "adapter/"  # as rlhf_core/models/adapters.py writes it
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_MODEL_ONLY = {"config.json", "generation_config.json"}
_NEVER = {"README.md", "metrics.jsonl"}


def make_release(
    store: Store,
    artifact: Artifact,
    layout: Layout = "merged",
    base: str | None = None,
    repository: str | None = None,
) -> Artifact:
    """Publish a release of a model to the store.

    Args:
        repository: id of the hub's repository that it is for.
        base: hub id of an adapter's base model, where the store does not know it.

    Raises:
        ModelError: the artifact has no such files, or the adapter's base model is on no hub.
    """
    top = {e.path: e for e in artifact.files if "/" not in e.path and e.path not in _NEVER}
    if "config.json" not in top or not any(path.endswith(".safetensors") for path in top):
        raise ModelError(
            f"{artifact.ref} holds no config.json with .safetensors files but "
            f"{', '.join(sorted(e.path for e in artifact.files)[:8])}; only a language model can "
            "be released."
        )
    files: dict[str, Path | FileEntry | bytes] = {**top}
    lineage = model_lineage(store, artifact)
    if layout == "adapter":
        config = _adapter_config(store, artifact, base)
        base = config["base_model_name_or_path"]
        files = {
            path: entry
            for path, entry in top.items()
            if path not in _MODEL_ONLY and not path.endswith(_WEIGHTS)
        }
        weights = "adapter_model.safetensors"
        files[weights] = artifact.file(ADAPTER + weights)
        files["adapter_config.json"] = _json(config)
    elif base is not None:
        raise ModelError("A base model (--base) belongs to an adapter: add --adapter.")
    else:
        base = base_model(lineage[-1])
    card = release_card(store, artifact, lineage, base, layout == "adapter", repository)
    files["README.md"] = card.encode()
    return store.publish_derived(
        kind="release",
        files=files,
        metadata={
            "name": artifact.metadata.get("name"),
            "layout": layout,
            "repository": repository,
        },
        parents=[artifact.digest],
    )


def _adapter_config(store: Store, artifact: Artifact, base: str | None) -> dict[str, Any]:
    """peft's adapter_config.json with a base model that other machines find."""
    path = f"{ADAPTER}adapter_config.json"
    if not any(entry.path == path for entry in artifact.files):
        raise ModelError(
            f"{artifact.ref} has no adapter: its last stage trained all weights. Leave out "
            "--adapter, or set lora in the stage's settings and train again."
        )
    config: dict[str, Any] = json.loads(store.read_bytes(artifact.digest, path))
    if base is None:
        base = _adapter_base(store, artifact, str(config.get("base_model_name_or_path") or ""))
    return {**config, "base_model_name_or_path": base}


def _adapter_base(store: Store, artifact: Artifact, reference: str) -> str:
    """The hub id of the model that an adapter belongs to."""
    advice = "push that model, then name its repository with --base OWNER/NAME."
    digest = re.fullmatch(r"artifact:([0-9a-f]{64})", reference)
    if digest is None:
        raise ModelError(
            f"The adapter of {artifact.ref} does not say which model it is for; {advice}"
        )
    try:
        model = model_lineage(store, store.get(digest[1]))
    except (ArtifactNotFound, ArtifactCorrupt):
        raise ModelError(
            f"The adapter of {artifact.ref} is for the model {digest[1][:12]}, which is no longer "
            "in the store; name its repository with --base OWNER/NAME."
        ) from None
    imported = all(str(m.metadata.get("algorithm")) == "import_model" for m in model)
    if imported and (found := hub_model(model[-1])):
        return found
    raise ModelError(
        f"The adapter of {artifact.ref} is for {model[0].ref} "
        f"({model[0].metadata.get('algorithm') or 'a model'}), which is on no hub: {advice}"
    )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
