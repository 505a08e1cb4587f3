"""Checks `model.source` before its import, and reads its config. Imports no torch.

A hub id takes one request to the hub, unless the model is in this machine's cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rlhf_core.errors import ModelError, RLHFError, StoreUnavailable
from rlhf_core.jobs import ModelSettings, NewModelSettings
from rlhf_core.model_files.folder_check import PICKLES, TOKENIZER_FILES, check_weight_files
from rlhf_core.model_files.source import Source, builtin_gguf, parse_source
from rlhf_core.store import Store

_TINY = {"vocab_size": 960, "max_position_embeddings": 1024, "num_attention_heads": 4}
RANDOM_CONFIG = {
    **_TINY, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128,
    "num_key_value_heads": 2,
}  # fmt: skip
BUILTIN_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }
}  # fmt: skip


def model_config(settings: ModelSettings, store: Store | None = None) -> dict[str, Any] | None:
    """The config.json of a model source; None if it is not available without a download.

    Args:
        store: holds the artifact of an `artifact:` source; without it, the result is None.
    """
    source = parse_source(settings.source)
    if source.kind == "random":
        kind = source.value
        tied = kind != "llama"
        sizes = {**RANDOM_CONFIG, "model_type": kind, "tie_word_embeddings": tied}
        if kind == "opt":
            sizes["ffn_dim"] = sizes.pop("intermediate_size")
        if kind in ("gpt2", "bloom"):
            del sizes["intermediate_size"]
        if kind in ("gpt2", "opt", "bloom"):
            del sizes["num_key_value_heads"]
        return sizes
    if source.kind == "builtin":
        return BUILTIN_CONFIGS[source.value]
    if source.kind == "artifact":
        return None if store is None else _object(store.read_bytes(source.value, "config.json"))
    path = source.folder if source.kind == "folder" else cached_snapshot(settings)
    try:
        return None if path is None else _object((path / "config.json").read_bytes())
    except OSError:
        return None


def new_model_sizes(settings: NewModelSettings) -> dict[str, Any]:
    """The sizes of a new model, as fields of its transformers config.

    The width of a gated MLP is 8/3 of the hidden size, as in LLaMA (arXiv 2302.13971); of a plain
    MLP, 4 times the hidden size.
    """
    d = settings.hidden_size
    common = {"tie_word_embeddings": settings.tie_embeddings}
    if settings.architecture == "gpt2":
        return common | {
            "n_embd": d, "n_layer": settings.layers, "n_head": settings.heads,
            "n_positions": settings.max_length,
        }  # fmt: skip
    return common | {
        "hidden_size": d, "intermediate_size": -(-8 * d // 48) * 16,
        "num_hidden_layers": settings.layers, "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads, "max_position_embeddings": settings.max_length,
    }  # fmt: skip


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def cached_snapshot(settings: ModelSettings) -> Path | None:
    """Folder of a hub model in this machine's cache; None if its config is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(settings.source, "config.json", revision=settings.revision)
    return Path(found).parent if isinstance(found, str) else None


def check_model(
    settings: ModelSettings,
    store: Store | None = None,
    *,
    contact: bool = True,
    packages: bool = True,
    kind: Literal["model", "reward_model"] = "model",
) -> list[str]:
    """Problems of the model source, one text each.

    Args:
        store: holds the artifact of an `artifact:` source.
        kind: expected kind of artifact; a reward model is never random or built-in.
        contact: False checks only the settings, without reading files, the store or the hub.
        packages: False for an import on another machine: a built-in model's package may be missing
    """
    try:
        source = parse_source(settings.source)
    except ModelError as error:
        return [str(error)]
    if kind == "reward_model" and source.kind in ("random", "builtin"):
        return [f"{settings.source} is no reward model; expected a folder, id or artifact of one"]
    problems = []
    if settings.revision is not None and source.kind != "hub":
        problems.append(
            f"model.revision is {settings.revision!r}, but {settings.source} is no Hugging Face id "
            "and has no revisions; clear it, or give an id"
        )
    if not contact:
        return problems
    try:
        if source.kind == "builtin" and packages:
            builtin_gguf(source.value)
        elif source.kind == "artifact" and store is not None:
            problems += _check_artifact(source, store, kind)
        elif source.kind == "folder":
            problems += check_weight_files(source.folder, is_language_model=kind == "model")
            if not problems and kind == "model":
                problems += _check_folder(settings, source.folder)
        elif source.kind == "hub":
            problems += _check_hub(settings)
    except RLHFError as error:
        problems.append(str(error))
    return problems


def _check_artifact(source: Source, store: Store, kind: str) -> list[str]:
    artifact = store.get(source.value)
    if artifact.kind == kind:
        return []
    return [
        f"artifact:{source.value} is {artifact.ref}, of kind {artifact.kind!r}; expected a "
        f"{kind!r}: see `rlhf artifacts list --kind {kind}`"
    ]


def _check_folder(settings: ModelSettings, folder: Path) -> list[str]:
    config = _object((folder / "config.json").read_bytes()) or {}
    if (code := config.get("auto_map")) and not settings.trust_remote_code:
        names = ", ".join(sorted(code)) if isinstance(code, dict) else str(code)[:200]
        return [
            f"{folder} contains its own Python code ({names}); read it, then set "
            "model.trust_remote_code to true"
        ]
    if not (folder / "tokenizer.json").exists() or config.get("auto_map"):
        return []  # its tokenizer needs torch or remote code; the import checks the template
    from rlhf_core.data.encoding.templates import end_of_turn, resolve_template
    from rlhf_core.data.encoding.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    try:
        tokenizer.chat_template = resolve_template(tokenizer, settings.chat_template)
        end_of_turn(tokenizer)
    except RLHFError:
        raise
    except Exception as error:  # transformers raises anything for settings of a wrong type
        return [
            f"the tokenizer in {folder} cannot be used ({type(error).__name__}: "
            f"{str(error)[:300]}); expected intact copies of tokenizer.json and "
            "tokenizer_config.json"
        ]
    return []


def _check_hub(settings: ModelSettings) -> list[str]:
    """One request for the list of files; a model in the cache needs none."""
    snapshot = cached_snapshot(settings)
    if snapshot is not None and any(snapshot.glob("*.safetensors")):
        return []
    from huggingface_hub import errors as hub

    from rlhf_core.data.sources.hub import HUB_SECONDS, ask_hub

    name = f"{settings.source}{f' (revision {settings.revision})' if settings.revision else ''}"
    try:
        info = ask_hub(
            lambda api: api.model_info(
                settings.source, revision=settings.revision, timeout=HUB_SECONDS
            )
        )
    except hub.GatedRepoError:
        return [f"{name} is gated; accept its terms on huggingface.co, then run `hf auth login`"]
    except hub.RevisionNotFoundError:
        return [f"{settings.source} has no revision {settings.revision!r}; correct model.revision"]
    except hub.RepositoryNotFoundError:
        return [
            f"the hub has no model {settings.source!r}, or it is private; correct model.source, or "
            "run `hf auth login`"
        ]
    except StoreUnavailable as error:
        return [
            f"{name} is not in this machine's Hugging Face cache, and {error}, or set model.source "
            "to a local folder or to builtin:smollm2-135m-instruct"
        ]
    except (hub.HfHubHTTPError, hub.HFValidationError) as error:
        return [
            f"the hub refused {name} ({str(error).splitlines()[0]}); correct model.source, or try "
            "again later"
        ]
    files = [sibling.rfilename for sibling in info.siblings or []]
    return [f"{name} {text}" for text in hub_file_problems(files)]


def hub_file_problems(names: list[str]) -> list[str]:
    """Problems of a hub model, from the names of its files."""
    top = [name for name in names if "/" not in name]
    problems = []
    if "config.json" not in top:
        problems.append("has no config.json: it is not a transformers model; give another id")
    if not any(name.endswith(".safetensors") for name in top):
        pickles = [name for name in top if name.endswith(PICKLES)]
        problems.append(
            f"has no safetensors weights{f', only {pickles[0]}' if pickles else ''}; expected "
            "safetensors, since a pickle can run any code: convert it at "
            "https://huggingface.co/spaces/safetensors/convert and give the new revision, or "
            "convert it into a local folder"
        )
    if not any(name in top for name in (*TOKENIZER_FILES, "tokenizer_config.json")):
        problems.append("has no tokenizer; use a model that has one")
    return problems
