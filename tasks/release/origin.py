"""Where a model and its data came from, as far as the Hugging Face hub knows them."""

from __future__ import annotations

from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound
from rlhf_core.model_files.source import BUILTINS
from rlhf_core.store import Artifact, Store


def model_lineage(store: Store, artifact: Artifact) -> list[Artifact]:
    """A model, the model that it was trained from, and so on to the imported or new one."""
    found = [artifact]
    while before := trained_from(found[-1]):
        try:
            found.append(store.get(before))
        except (ArtifactNotFound, ArtifactCorrupt):  # deleted: the rest is not known
            break
    return found


def trained_from(model: Artifact) -> str:
    """Digest of the model that a model was made from; "" for an imported or a new one."""
    data = model.metadata
    if model.kind == "published":
        return str(data.get("policy") or "")
    if str(data.get("source") or "").startswith("artifact:"):
        return model.parents[0]
    return str(_job(model).get("model") or "")


def hub_model(model: Artifact) -> str | None:
    """The hub id that a model was imported from; None if it came from elsewhere."""
    source = str(model.metadata.get("source") or "")
    # A folder may be called owner/name too. Only the fingerprint of a hub's model begins with it.
    return source if str(_job(model).get("fingerprint")).startswith(f"{source}@") else None


def base_model(model: Artifact) -> str | None:
    """The hub id of an imported model, for a model card: also of a built-in one, whose weights are
    a quantised form of the hub's."""
    source = str(model.metadata.get("source") or "")
    builtin = BUILTINS.get(source.removeprefix("builtin:"))
    return builtin.hub if builtin and source.startswith("builtin:") else hub_model(model)


def hub_data(data: Artifact) -> str | None:
    """The hub id of a data set; None if it came from elsewhere."""
    kind, _, rest = str(_job(data).get("fingerprint")).partition(":")
    return rest.rpartition("@")[0] if kind == "hub" else None


def _job(artifact: Artifact) -> dict[str, Any]:
    return artifact.metadata.get("job") or {}
